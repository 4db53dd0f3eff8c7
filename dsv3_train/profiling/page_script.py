"""What the page of a report does in a browser: draw the visible part of the timeline on a canvas."""

SCRIPT = r"""
const ranks = JSON.parse(document.getElementById("data").textContent);
const canvas = document.getElementById("canvas"), tip = document.getElementById("tip");
const LEFT = 110, TOP = 26, ROW = 26, GAP = 5, MARK = 14;
let rank = ranks[0], from = 0, to = 1, waiting = false;

function rows() {
  let y = TOP;
  const found = rank.marks.map(m => { const r = {y, height: MARK, mark: m, name: m.name}; y += MARK + GAP; return r; });
  for (const s of rank.streams) { found.push({y, height: ROW, stream: s, name: s.stream}); y += ROW + GAP; }
  return [found, y + 4];
}
function prepare(r) {
  // The longest box so far bounds how far back a visible one may have begun.
  for (const s of [...r.streams, ...r.marks]) s.longest = s.length.reduce((a, b) => Math.max(a, b), 0);
}
ranks.forEach(prepare);
function first(starts, time) {
  let low = 0, high = starts.length;
  while (low < high) { const mid = (low + high) >> 1; if (starts[mid] < time) low = mid + 1; else high = mid; }
  return low;
}
function told(ns) {
  if (ns >= 1e6) return (ns / 1e6).toFixed(3) + " ms";
  return ns >= 1e3 ? (ns / 1e3).toFixed(2) + " us" : ns + " ns";
}
function draw() {
  waiting = false;
  const [all, height] = rows(), width = canvas.clientWidth, sharp = window.devicePixelRatio || 1;
  canvas.style.height = height + "px";
  canvas.width = width * sharp; canvas.height = height * sharp;
  const g = canvas.getContext("2d");
  g.scale(sharp, sharp);
  g.font = "12px system-ui, sans-serif"; g.textBaseline = "middle";
  const scale = (width - LEFT) / (to - from), x = t => LEFT + (t - from) * scale;
  axis(g, scale, width, height);
  for (const row of all) {
    g.fillStyle = "#1f2328"; g.fillText(row.name, 8, row.y + row.height / 2, LEFT - 14);
    g.fillStyle = "#f6f8fa"; g.fillRect(LEFT, row.y, width - LEFT, row.height);
    const source = row.stream || row.mark;
    let lastX = -1, lastColour = "";
    for (let i = first(source.start, from - source.longest); i < source.start.length && source.start[i] < to; i++) {
      const left = Math.max(LEFT, x(source.start[i])), right = Math.min(width, x(source.start[i] + source.length[i]));
      if (right < LEFT) continue;
      const colour = row.mark ? row.mark.colour : rank.colours[source.cls[i]];
      const w = Math.max(right - left, 0.6), pixel = Math.floor(left * sharp);
      if (w < 1 && pixel === lastX && colour === lastColour) continue;
      lastX = pixel; lastColour = colour;
      g.fillStyle = colour;
      if (row.mark ? source.busy[i] < source.length[i] : source.count[i] > 1) {
        // As full as it is busy; the rest shows that it is several.
        const part = Math.min(1, source.busy[i] / Math.max(1, source.length[i])), h = row.height * part;
        g.fillRect(left, row.y + row.height - h, w, h);
      } else {
        g.globalAlpha = row.mark && w < 1 ? Math.max(0.2, right - left) : 1;
        g.fillRect(left, row.y, w, row.height);
        g.globalAlpha = 1;
        if (row.stream && w > 50) {
          g.fillStyle = "#fff";
          g.save(); g.beginPath(); g.rect(left, row.y, w - 2, row.height); g.clip();
          const name = rank.classes[source.cls[i]].name + ": " + rank.names[source.name[i]];
          g.fillText(name, left + 4, row.y + row.height / 2); g.restore();
        }
        if (w > 3) { g.fillStyle = "rgba(255,255,255,.7)"; g.fillRect(right - 0.7, row.y, 0.7, row.height); }
      }
    }
  }
}
function axis(g, scale, width, height) {
  const least = 90 / scale, power = Math.pow(10, Math.floor(Math.log10(least)));
  const step = [1, 2, 5, 10].map(f => f * power).find(s => s >= least);
  g.strokeStyle = "#e3e6ea"; g.fillStyle = "#57606a"; g.lineWidth = 1;
  for (let t = Math.ceil(from / step) * step; t <= to; t += step) {
    const at = LEFT + (t - from) * scale;
    g.beginPath(); g.moveTo(at, TOP - 6); g.lineTo(at, height); g.stroke();
    g.fillText(step >= 1e5 ? +(t / 1e6).toFixed(2) + " ms" : +(t / 1e3).toFixed(3) + " us", at + 3, 10);
  }
}
function again() { if (!waiting) { waiting = true; requestAnimationFrame(draw); } }
function show(start, end) {
  const least = 200, span = Math.max(least, Math.min(end - start, rank.span * 1.02 || 1));
  from = Math.max(-0.01 * rank.span, Math.min(start, rank.span * 1.01 - span)); to = from + span; again();
}
function whole() { show(0, rank.span || 1); }
function line(text) { const d = document.createElement("div"); d.textContent = text; return d; }
function at(event) {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top,
          from + (event.clientX - box.left - LEFT) / (canvas.clientWidth - LEFT) * (to - from)];
}
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  const t = at(event)[2], factor = Math.exp(Math.max(-60, Math.min(60, event.deltaY)) * 0.006);
  show(t - (t - from) * factor, t - (t - from) * factor + (to - from) * factor);
}, {passive: false});
let held = null;
canvas.addEventListener("mousedown", event => { held = [event.clientX, from, to]; });
window.addEventListener("mouseup", () => { held = null; });
canvas.addEventListener("dblclick", whole);
canvas.addEventListener("mouseleave", () => { tip.style.display = "none"; });
canvas.addEventListener("mousemove", event => {
  if (held) {
    const moved = (event.clientX - held[0]) / (canvas.clientWidth - LEFT) * (held[2] - held[1]);
    show(held[1] - moved, held[2] - moved); tip.style.display = "none"; return;
  }
  const [px, py, t] = at(event), row = rows()[0].find(r => py >= r.y && py < r.y + r.height);
  tip.style.display = "none";
  if (!row) return;
  const source = row.stream || row.mark, slack = 1.5 * (to - from) / canvas.clientWidth;
  let hit = -1;
  const end = first(source.start, t + slack);
  for (let i = first(source.start, t - source.longest - slack); i < end; i++)
    if (source.start[i] + source.length[i] >= t - slack) hit = i;
  if (hit < 0) return;
  const lines = [`${told(source.length[hit])}, from ${told(source.start[hit])}`];
  if (row.mark) lines.unshift(`${row.name} for ${told(source.busy[hit])}`);
  else if (source.count[hit] > 1)
    lines.unshift(`${source.count[hit]} kernels, busy ${told(source.busy[hit])}, ${rank.classes[source.cls[hit]].kind}`,
                  `drawn as one: none is longer than ${told(rank.merged_below_ns)}`);
  else lines.unshift(rank.classes[source.cls[hit]].name, rank.names[source.name[hit]]);
  tip.replaceChildren(...lines.map(line));
  tip.style.display = "block";
  tip.style.left = Math.max(0, Math.min(px + 14, canvas.clientWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = (row.y + row.height + 6) + "px";
});
document.addEventListener("click", event => {
  const button = event.target.closest("button[data-start]");
  if (!button) return;
  const start = +button.dataset.start, length = +button.dataset.length;
  show(start - 2 * length, start + 3 * length); canvas.scrollIntoView({behavior: "smooth", block: "center"});
});
function key() {
  document.getElementById("key").replaceChildren(...rank.classes.map((c, i) => {
    const span = document.createElement("span"), box = document.createElement("i");
    box.style.background = rank.colours[i]; span.append(box, c.name); return span;
  }));
}
const chooser = document.getElementById("rank");
if (chooser) chooser.addEventListener("change", () => {
  rank = ranks[+chooser.value];
  document.querySelectorAll("section.rank").forEach((s, i) => { s.hidden = i !== +chooser.value; });
  key(); whole();
});
window.addEventListener("resize", again);
key(); whole();
"""
