"""What transformers makes of exported directories: logits, greedy tokens, and text through AutoTokenizer.

    python tools/exported.py OUT DIR [DIR ...]

Runs by any interpreter that has transformers 4.57 or 5.x, without this project; OUT/NAME.pt holds, for each directory,
`logits` of 32 tokens, [1, 32, vocabulary], `generated` after the first 4 of them, and, with a tokenizer.json, what is
`rendered` by the chat template, `ids` of that, `text` of it again, and `continued`. A directory's code is never run:
kimi_k2 and the language model of Kimi-VL are read as a deepseek_v3, as their own classes are.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

TOKENS = 32
PROMPT = "Say it again."


def tokens(vocabulary: int) -> torch.Tensor:
    """The tokens whose logits are compared, [1, 32]."""
    return torch.randint(0, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def model(path: Path) -> Any:
    """The language model of a directory in FP32."""
    config = json.loads((path / "config.json").read_text())
    if "text_config" in config:
        with tempfile.TemporaryDirectory() as alone:
            language_model(path, Path(alone))
            return model(Path(alone))
    kind, options = transformers.AutoModelForCausalLM, {}
    if config["model_type"] == "kimi_k2":
        kind = transformers.DeepseekV3ForCausalLM
        options["config"] = transformers.DeepseekV3Config.from_dict({**config, "model_type": "deepseek_v3"})
    loaded, info = kind.from_pretrained(
        path, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise SystemExit(f"{path}: missing {info['missing_keys']}, of other shapes {info['mismatched_keys']}")
    return loaded.eval()


def language_model(path: Path, to: Path) -> None:
    """Write the language model of a vision-language directory by itself."""
    text = json.loads((path / "config.json").read_text())["text_config"]
    (to / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", **text}))
    stored = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    prefix = "language_model."
    contents = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    save_file(contents, to / "model.safetensors", metadata={"format": "pt"})


def run(path: Path) -> dict[str, Any]:
    """Everything of a directory that OUT holds."""
    loaded = model(path)
    prompt = tokens(loaded.config.vocab_size)
    greedy = {"do_sample": False, "max_new_tokens": 8, "max_length": None}
    begun = prompt[:, :4]
    with torch.no_grad():
        found = {"version": transformers.__version__, "logits": loaded(prompt).logits}
        found["generated"] = loaded.generate(begun, attention_mask=torch.ones_like(begun), **greedy)
        if (path / "tokenizer.json").is_file():
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            message = [{"role": "user", "content": PROMPT}]
            found["rendered"] = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            inputs = tokenizer(found["rendered"], return_tensors="pt", add_special_tokens=False)
            found["ids"] = inputs["input_ids"][0].tolist()
            found["text"] = tokenizer.decode(found["ids"])
            found["special"] = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
            found["continued"] = loaded.generate(**inputs, **greedy)
    return found


def main() -> None:
    """The command line."""
    out, *paths = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    for path in paths:
        torch.save(run(path), out / f"{path.name}.pt")


if __name__ == "__main__":
    main()
