"""Texts behind the token ids of cl100k_base, OpenAI's tokenizer: clients that cut texts with it send its ids."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quiver.config import EngineConfig
from quiver.errors import ConfigError, InvalidInput
from quiver.types import IdsOf, Input

SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
"""Of cl100k_base.tiktoken, by which the tiktoken package knows it too."""
FILES = ("cl100k_base.tiktoken", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4")
"""What the file is called: by itself, and in tiktoken's cache."""
SPECIAL: Mapping[int, bytes] = {
    100257: b"<|endoftext|>",
    100258: b"<|fim_prefix|>",
    100259: b"<|fim_middle|>",
    100260: b"<|fim_suffix|>",
    100276: b"<|endofprompt|>",
}


@dataclass(frozen=True, slots=True)
class Cl100k:
    """The bytes of each token, by its id."""

    tokens: Mapping[int, bytes]

    def decode(self, ids: Sequence[int], index: int) -> str:
        """Return the text of input number `index`; a character of which a part is missing is U+FFFD."""
        try:
            text = b"".join([self.tokens[i] for i in ids])
        except KeyError as error:
            raise InvalidInput(
                f"input {index} holds {error.args[0]}, which is no token id of OpenAI's cl100k_base. Send the text "
                "instead, or the model's own ids with token_encoding=native.",
                param=f"input[{index}]",
            ) from error
        return text.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class OpenAIIds:
    """What the server takes token ids for that come by OpenAI's API."""

    meaning: IdsOf = "native"
    """Where a request does not say."""
    table: Cl100k | None = None

    def read(self, inputs: Sequence[Input], ids_of: IdsOf) -> Sequence[Input]:
        """Put texts in the place of OpenAI's ids; texts and the model's own stay. Raises `InvalidInput`."""
        meaning = self.meaning if ids_of == "configured" else ids_of
        if meaning == "native":
            return inputs
        if meaning == "refuse":
            raise InvalidInput("token ids are not taken here: send texts", param="input")
        if self.table is None:
            raise InvalidInput(
                "ids of OpenAI's cl100k_base are not taken here (setting openai_ids): send texts",
                param="token_encoding",
            )
        table = self.table
        # An input without ids has no text either: it is refused as what it is.
        return [g if isinstance(g, str) or not g else table.decode(g, i) for i, g in enumerate(inputs)]


def configured(config: EngineConfig) -> OpenAIIds:
    """Return what is set; reads the table where it is needed. Raises `ConfigError`."""
    if config.openai_ids != "cl100k":
        return OpenAIIds(config.openai_ids)
    if config.cl100k_file is None:
        raise ConfigError(
            "openai_ids = cl100k needs OpenAI's table, which is not part of Quiver: name the file "
            "cl100k_base.tiktoken, or tiktoken's cache directory that holds it, with cl100k_file (TIKTOKEN_CACHE_DIR)"
        )
    return OpenAIIds("cl100k", load(config.cl100k_file))


def load(path: Path, *, sha256: str = SHA256) -> Cl100k:
    """Read the table, from the file or from the directory that holds it. Raises `ConfigError`."""
    file = next((path / name for name in FILES if (path / name).is_file()), path)
    try:
        content = file.read_bytes()
    except OSError as error:
        there = f"holds neither {FILES[0]} nor tiktoken's copy of it" if path.is_dir() else error.strerror
        raise ConfigError(f"cl100k_file: {path}: {there}") from error
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ConfigError(f"cl100k_file: {file} is not OpenAI's cl100k_base.tiktoken (its SHA-256 is {found})")
    try:
        return Cl100k({**dict(map(_token, content.splitlines())), **SPECIAL})
    except ValueError as error:
        raise ConfigError(f"cl100k_file: {file} has a line that is not a token in base64 and its id") from error


def _token(line: bytes) -> tuple[int, bytes]:
    """Read `IQ== 0`."""
    token, _, number = line.partition(b" ")
    return int(number), base64.b64decode(token, validate=True)
