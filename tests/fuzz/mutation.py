"""Mutations of valid inputs: of bytes, and of structures whose checksums are computed again."""

import copy
import io
import json
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

# Bytes and texts that parsers often treat specially.
_MAGIC = (
    *(b"\0", b"\xff", b"\x80", b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff" * 8),
    *(b"\0" * 8, b"\n", b"\r\n", b"\t", b" ", b'"', b"'", b"\\", b"/", b"../", b"<b>", b"&"),
    *(b"%", b"{", b"}", b"[", b"]", b"(", b")", b":", b";", b",", b"=", b"+", b"-", b"*", b"|"),
    *(b"NaN", b"Infinity", b"-1", b"1e999", b"1e-999999999", b"1e999999999", b"9" * 30),
    *(
        b"9" * 5000,
        b"[" * 100_000,
        b'{"a":' * 20_000,
        b"null",
        b"true",
        b"\xc3\x28",
        b"\xed\xa0\x80",
    ),
    *("\u2028".encode(), "\u0660".encode(), "²".encode(), b"\\ud800", b"\x1b[2J", b"\xef\xbb\xbf"),
)
# JSON values of other types and ranges than expected.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 255, 2**31, 2**53 + 1, 2**63, -(2**63), 10**30, 10**400),
    *(0.5, -0.5, 1e-300, 1e308, float("nan"), float("inf"), -float("inf"), 1e20),
    *("", "x", "0", "-1", "x" * 10_000, "\ud800", "\0", "a\nb", "../x", "/", "é", "e\u0301"),
    *("<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "{{ 7 * 7 }}", "$\\frac{$"),
    *("=1+1", "\x1b[2J", "hf:", "gs://x/y", "train[:10%]"),
    *([], {}, [[]], [None], [1, 2], ["a"], {"": 0}, {"a": {"b": []}}, [[[[[]]]]], [0] * 1000),
)
_BLOCK = 512


def pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    """Picks one of some items."""
    return items[int(rng.integers(len(items)))]


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Applies one to four edits: bit flips, cuts, splices, lengths, repeats and magic values."""
    content = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        # Headers and directories are at the ends.
        reach = len(content) if rng.random() < 0.6 else min(len(content), 64)
        position = int(rng.integers(reach + 1))
        if rng.random() < 0.2:
            position = len(content) - position
        length = int(2 ** rng.uniform(0, 7))
        match int(rng.integers(10)):
            case 0 if position < len(content):
                content[position] ^= 1 << int(rng.integers(8))
            case 1:
                content[position : position + length] = rng.bytes(length)
            case 2:
                content[position:position] = rng.bytes(length)
            case 3:
                del content[position : position + length]
            case 4:
                start = int(rng.integers(len(content) + 1))
                content[position:position] = content[start : start + length]
            case 5:
                content[position:position] = pick(rng, _MAGIC)
            case 6:
                token = pick(rng, _MAGIC)
                content[position : position + len(token)] = token
            case 7:
                _edit_length(content, position, rng)
            case 8 if rng.random() < 0.5:
                del content[position:]
            case _:
                start = int(rng.integers(len(content) + 1))
                part = content[start : start + length]
                content[position : position + length] = part
    return bytes(content)


def _edit_length(content: bytearray, position: int, rng: np.random.Generator) -> None:
    """Changes a number of 2, 4 or 8 bytes, as lengths in headers are."""
    size = int(2 ** rng.integers(1, 4))
    order = pick(rng, ("little", "big"))
    number = int.from_bytes(content[position : position + size], order)
    change = pick(rng, (1, -1, 2, 255, -256, 2**15, 2**31, -number, number, 2**63))
    content[position : position + size] = ((number + change) % 2 ** (8 * size)).to_bytes(
        size, order
    )


def mutate_text(data: bytes, rng: np.random.Generator) -> bytes:
    """Edits text: mostly inserts, repeats, removes or moves words and marks, and damages bytes."""
    if rng.random() < 0.3:
        return mutate(data, rng)
    text = data
    for _ in range(int(rng.integers(1, 4))):
        start, stop = sorted(rng.integers(len(text) + 1, size=2).tolist())
        part = text[start:stop]
        match int(rng.integers(5)):
            case 0:
                text = text[:start] + text[stop:]
            case 1:
                text = text[:start] + part * int(rng.integers(2, 5)) + text[stop:]
            case 2:
                text = text[:start] + pick(rng, _MAGIC) + text[start:]
            case 3:
                text = text[:start] + pick(rng, _MAGIC) + text[stop:]
            case _:
                text = text[stop:] + part + text[:start]
    return text[:200_000]


def mutate_json(data: bytes, rng: np.random.Generator) -> bytes:
    """Replaces, removes, copies or renames parts of a JSON document; sometimes damages the text."""
    try:
        document = json.loads(data)
    except ValueError:
        return mutate_text(data, rng)
    if rng.random() < 0.2:
        return mutate_text(data, rng)
    for _ in range(int(rng.integers(1, 4))):
        document = _mutate_node(document, rng)
    return json.dumps(document).encode()


def _mutate_node(document: Any, rng: np.random.Generator) -> Any:
    """Returns a document with one changed part."""
    places = list(_containers(document))
    if not places or rng.random() < 0.02:
        return copy.deepcopy(pick(rng, _VALUES))
    container = pick(rng, places)
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    key = pick(rng, keys)
    match int(rng.integers(8)):
        case 0:
            del container[key]
        case 1:
            other = pick(rng, places)
            other_key = pick(rng, list(other) if isinstance(other, dict) else range(len(other)))
            # A copy: a document must not contain itself.
            container[key] = json.loads(json.dumps(other[other_key]))
        case 2 if isinstance(container, dict):
            name = pick(rng, ("", "x", key.upper(), key + " ", "__class__", "\ud800", "a.b", "a/b"))
            container[name] = container.pop(key)
        case 3 if isinstance(container, list):
            container.extend([container[key]] * int(rng.integers(1, 4)))
        case 4 if isinstance(container[key], int | float):
            factor = pick(rng, (-1, 2, 0.5, 1e6, 1e30))
            # Larger integers cannot be multiplied by floating-point numbers.
            container[key] = min(container[key], 2**1000) * factor
        case 5 if isinstance(container[key], str):
            text = mutate_text(container[key].encode("utf-8", "replace"), rng)
            container[key] = text.decode("utf-8", "replace")
        case _:
            container[key] = copy.deepcopy(pick(rng, _VALUES))
    return document


def _containers(node: Any) -> Any:
    """Yields all lists and dicts of a document that are not empty."""
    if isinstance(node, list | dict) and node:
        yield node
        for child in list(node.values() if isinstance(node, dict) else node):
            yield from _containers(child)


def mutate_json_lines(data: bytes, rng: np.random.Generator) -> bytes:
    """Mutates one line of a file of JSON objects, or removes, repeats or moves lines."""
    lines = data.split(b"\n")
    index = int(rng.integers(max(1, len(lines) - 1)))
    match int(rng.integers(8)):
        case 0:
            lines.insert(int(rng.integers(len(lines))), lines[index])
        case 1:
            lines.insert(int(rng.integers(len(lines))), lines.pop(index))
        case 2:
            return mutate_text(data, rng)
        case _:
            lines[index] = mutate_json(lines[index] or b"{}", rng)
    return b"\n".join(lines)


def mutate_cells(data: bytes, rng: np.random.Generator) -> bytes:
    """Mutates one cell of a table in CSV, or removes, repeats or moves cells."""
    if rng.random() < 0.3:
        return mutate_text(data, rng)
    rows = [line.split(b",") for line in data.split(b"\n")]
    row = pick(rng, rows)
    index = int(rng.integers(len(row)))
    match int(rng.integers(5)):
        case 0:
            row.insert(index, row[index])
        case 1 if len(row) > 1:
            del row[index]
        case 2:
            row[index] = pick(rng, pick(rng, rows))
        case 3:
            row[index] = pick(rng, _MAGIC)
        case _:
            row[index] = mutate_text(row[index], rng)
    return b"\n".join(b",".join(row) for row in rows)


def mutate_zip(data: bytes, rng: np.random.Generator) -> bytes:
    """Mutates a member of a zip archive, or its name, or repeats or removes one.

    The checksums are those of the result.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    index = int(rng.integers(len(members)))
    name, content = members[index]
    match int(rng.integers(8)):
        case 0:
            del members[index]
        case 1:
            members.append(members[index])
        case 2:
            name = mutate_text(name.encode(), rng)[:1000].decode("utf-8", "replace")
            members[index] = (name, content)
        case 3 | 4 if name.endswith(".npy"):
            members[index] = (name, _mutate_npy(content, rng))
        case _:
            members[index] = (name, mutate(content, rng))
    kind = pick(rng, (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", kind) as archive:
        warnings.simplefilter("ignore")  # Some names are duplicates.
        for name, content in members:
            with archive.open(zipfile.ZipInfo(name or "x"), "w") as member:
                member.write(content)
    return buffer.getvalue()


def _mutate_npy(content: bytes, rng: np.random.Generator) -> bytes:
    """Replaces parts of the header of an .npy file, whose length is correct."""
    start = 10
    stop = start + int.from_bytes(content[8:10], "little")
    header = content[start:stop]
    shapes = (b"(0,)", b"(-1,)", b"()", b"(1e9,)", b"(2**40,)", b"(99999999999, 99999999999)")
    types = (
        b"'<f8'",
        b"'|O'",
        b"'V2'",
        b"'<M8[s]'",
        b"'<U1000000000'",
        b"[('a', '<f4')]",
        b"'|b1'",
    )
    match int(rng.integers(3)):
        case 0:
            before, _, after = header.partition(b"(")
            header = before + pick(rng, shapes) + after.partition(b")")[2]
        case 1:
            header = header.replace(b"'<f4'", pick(rng, types))
        case _:
            header = mutate_text(header, rng)[:60_000]
    return content[:8] + struct.pack("<H", len(header)) + header + content[stop:]


def mutate_tar(data: bytes, rng: np.random.Generator) -> bytes:
    """Mutates fields of the headers of a tar archive, whose checksums are computed again."""
    if rng.random() < 0.2:
        return mutate(data, rng)
    content = bytearray(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [(info.offset, info.offset_data, info.size) for info in archive]
    for _ in range(int(rng.integers(1, 3))):
        start, start_of_data, size = pick(rng, members)
        # Offset and length of name, mode, size, time, type, link, magic, prefix.
        fields = (
            (0, 100),
            (100, 8),
            (124, 12),
            (136, 12),
            (156, 1),
            (157, 100),
            (257, 8),
            (345, 155),
        )
        offset, length = pick(rng, fields)
        numbers = (
            b"77777777777\0",
            b"-0000000001\0",
            b"\x80" + b"\xff" * 11,
            b"\xff" * 12,
            b"0" * 12,
        )
        names = (b"../../x.jpg", b"/etc/x.png", b"a" * 100, b"\xff\xfe.png", b"x.tar/y.png", b"")
        match int(rng.integers(6)):
            case 0:
                value = pick(rng, numbers)
            case 1:
                value = pick(rng, names)
            case 2:
                value = bytes([int(rng.integers(256))])
            case 3:
                value = pick(
                    rng, (b"0", b"1", b"2", b"5", b"6", b"L", b"x", b"g", b"S", b"K", b"\0")
                )
                offset, length = 156, 1
            case 4:
                end = start_of_data + size
                content[start_of_data:end] = mutate(bytes(content[start_of_data:end]), rng)[
                    :size
                ].ljust(size, b"\0")
                continue
            case _:
                value = mutate(bytes(content[start + offset : start + offset + length]), rng)
        content[start + offset : start + offset + length] = value[:length].ljust(length, b"\0")
        header = content[start : start + _BLOCK]
        header[148:156] = b" " * 8
        content[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    if rng.random() < 0.2:
        first, second = (pick(rng, members)[0] for _ in range(2))
        content[first:first] = content[min(first, second) : max(first, second)]
    return bytes(content)


def mutate_safetensors(data: bytes, rng: np.random.Generator) -> bytes:
    """Mutates the JSON header of a safetensors file, whose length is correct."""
    if rng.random() < 0.3:
        return mutate(data, rng)
    stop = 8 + int.from_bytes(data[:8], "little")
    document = json.loads(data[8:stop])
    if rng.random() < 0.3 and "__metadata__" in document:
        metadata = document["__metadata__"]
        name = pick(rng, list(metadata))
        metadata[name] = mutate_json(metadata[name].encode(), rng).decode("utf-8", "replace")
        if rng.random() < 0.7:
            metadata.pop("mixer_jax_crc32", None)
        header = json.dumps(document).encode()
    else:
        header = mutate_json(data[8:stop], rng)
    return struct.pack("<Q", len(header)) + header + data[stop:]
