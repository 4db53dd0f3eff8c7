"""The events of a Chrome trace one by one, in little memory: the file is never held as a whole."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from dsv3_train.errors import UserError, on_one_line
from dsv3_train.regular import opened

_CHUNK = 1 << 20
_HOPELESS = 1 << 25
"""Characters of a single value after which it is taken for broken, not for unfinished."""
_EXPANDED, _RATIO = 1 << 26, 250
"""Bytes out of gzip from which on they may be no more than so many times the bytes in: traces come to 10 to 40."""
_BLANK = re.compile(r"[ \t\r\n]*")
# Numbers with a point stay text: a time of 1.7e15 us with three decimals does not fit into a double.
_DECODER = json.JSONDecoder(parse_float=str, strict=False)
_scan = _DECODER.scan_once  # type: ignore[attr-defined]


class Events:
    """Iterates over the events of a file, `.json` or gzipped; `distributedInfo` is in `header` afterwards.

    Both forms of the format are read: an object with `traceEvents`, and a bare array. Floats are left as text.

    Raises:
        UserError: on iteration: no such file, no JSON, no trace, or one that is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told = on_one_line(str(path))
        self.header: dict[str, Any] = {}
        self.unclosed = False
        """Whether the end of a bare array is missing, which the format allows."""
        self.count = 0

    def __iter__(self) -> Iterator[dict]:
        try:
            with opened(self.path) as file:
                text = _Text(file, self.told)
                yield from self._events(text)
                if text.next(_BLANK):
                    where = text.passed + text.at
                    raise UserError(
                        f"{self.told}: more text after the trace's end, at character {where:,}: were several traces "
                        "put together? Give each as a file of its own"
                    )
        except OSError as error:  # BadGzipFile is one
            raise UserError(f"{self.told}: cannot read ({error.strerror or error})") from None
        except (EOFError, zlib.error) as error:
            how = "ends too early" if isinstance(error, EOFError) else "is damaged"
            raise self._cut_off(f"its gzip stream {how}") from None
        except RecursionError:
            raise UserError(f"{self.told}: not a trace (values nested too deep)") from None

    def _cut_off(self, how: str) -> UserError:
        return UserError(
            f"{self.told}: the trace is cut off after {self.count:,} events ({how}); record or copy it again"
        )

    def _events(self, text: _Text) -> Iterator[dict]:
        first = text.next(_BLANK)
        if first == "":
            raise UserError(f"{self.told}: the file is empty")
        if first == "[":
            text.at += 1
            yield from self._array(text)
            return
        if first != "{":
            raise UserError(f"{self.told}: not a trace: JSON begins with {{ or [, this file with {first!r}")
        text.at += 1
        found, keys = False, list[str]()
        wanted = False  # a comma
        while True:
            mark = text.next(_BLANK)
            if mark == "}":
                text.at += 1
                break
            if wanted:
                wanted = self._comma(text, mark)
                continue
            if mark != '"':
                raise self._wrong(text, "a key was expected")
            key = self._value(text)
            if text.next(_BLANK) != ":":
                raise self._wrong(text, "a colon was expected")
            text.at += 1
            wanted = True
            if text.next(_BLANK) == "[" and key == "traceEvents":
                found = True
                text.at += 1
                yield from self._array(text)
            else:
                value = self._value(text)
                if key == "distributedInfo":
                    self.header[key] = value
                if len(keys) < 5:
                    keys.append(on_one_line(str(key)[:40]))
        if not found:
            told = ", ".join(keys) or "none"
            raise UserError(f"{self.told}: no trace: its object has no list `traceEvents` (keys: {told})")

    def _array(self, text: _Text) -> Iterator[dict]:
        wanted = False  # a comma; the format allows one after the last event too
        while True:
            mark = text.next(_BLANK)
            if mark == "]":
                text.at += 1
                return
            if mark == "" and self.count:  # within an object, its own end is missed next
                self.unclosed = True
                return
            if wanted:
                wanted = self._comma(text, mark)
                continue
            event = self._value(text)
            if not isinstance(event, dict):
                raise UserError(f"{self.told}: not a trace: event {self.count} is no object but {_short(event)}")
            self.count += 1
            wanted = True
            yield event

    def _comma(self, text: _Text, mark: str) -> bool:
        """Go over it; False."""
        if mark != ",":
            raise self._wrong(text, "a comma was expected")
        text.at += 1
        return False

    def _value(self, text: _Text) -> Any:
        """The JSON value at the text's place, read on as far as needed."""
        more = _CHUNK
        while True:
            try:
                value, end = _scan(text.buffer, text.at)
                if end < len(text.buffer) or text.ended:
                    text.at = end
                    return value
            except (ValueError, StopIteration) as error:  # a number of too many digits is no JSONDecodeError
                position = getattr(error, "pos", getattr(error, "value", None)) or text.at
                what = getattr(error, "msg", "no JSON value" if isinstance(error, StopIteration) else "too many digits")
                if text.ended:
                    where = text.passed + len(text.buffer)
                    if position < len(text.buffer) - 1 and "Unterminated" not in str(error):
                        raise self._wrong(text, what, position) from None
                    raise self._cut_off(f"at character {where:,}, within a value") from None
                if len(text.buffer) - text.at > _HOPELESS:
                    raise self._wrong(text, what, position) from None
            text.read(more)
            more *= 2

    def _wrong(self, text: _Text, what: str, at: int | None = None) -> UserError:
        if text.at >= len(text.buffer) and text.ended:
            return self._cut_off(f"at character {text.passed + len(text.buffer):,}")
        at = text.at if at is None else at
        near = text.buffer[at : at + 20]
        return UserError(f"{self.told}: not valid JSON at character {text.passed + at:,}: {what}, near {near!r}")


def _short(value: Any) -> str:
    return f"{value[:40]!r}" if isinstance(value, str) else type(value).__name__


class _Text:
    """A file's text through a window; decompressed if it begins as gzip does, whatever its name."""

    def __init__(self, file: BinaryIO, told: str) -> None:
        self.raw, self.told = file, told
        zipped = file.peek(2)[:2] == b"\x1f\x8b"  # type: ignore[attr-defined]
        self.file: IO[bytes] = gzip.GzipFile(fileobj=file) if zipped else file  # type: ignore[assignment]
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self.buffer, self.at, self.ended = "", 0, False
        self.passed = 0
        """Characters that have left the window."""
        self.out = 0
        """Bytes so far."""

    def read(self, size: int) -> None:
        data = self.file.read(size)
        self.ended = not data
        self.out += len(data)
        if self.out > _EXPANDED and self.out > _RATIO * self.raw.tell():
            raise UserError(
                f"{self.told}: its gzip stream holds more than {_RATIO} times its size, as no trace does; if it is "
                "one, unpack it first"
            )
        self.passed += self.at
        self.buffer = self.buffer[self.at :] + self.decoder.decode(data, final=self.ended)
        self.at = 0

    def next(self, skipped: re.Pattern) -> str:
        """The first character after what is skipped, which becomes the place; empty at the end."""
        while True:
            self.at = skipped.match(self.buffer, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if self.ended:
                return ""
            self.read(_CHUNK)
