"""The characters by which byte-level BPE writes bytes: printable ones as themselves, the rest from U+0100 on."""

from __future__ import annotations

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTABLE)

CHARACTERS = {**{byte: chr(byte) for byte in _PRINTABLE}, **{byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}}
BYTES = {character: byte for byte, character in CHARACTERS.items()}
