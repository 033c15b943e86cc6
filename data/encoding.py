"""Encodings of texts: token ids of letters, of bytes and of GPT-2, and their text."""

import codecs

import numpy as np

from data.common import DataError, reason

UNKNOWN = "\ufffd".encode()  # the text of an id that has none
SHOWN = 60  # characters of a description that an error repeats


class Encoding:
    """`size` token ids from 0 on. `end`: the id that ends a document, or None.

    encode(str) -> their ids (n,), of the smallest unsigned dtype that holds all ids; raises
    DataError for a character that has none. piece(id) -> its UTF-8 bytes, which may be a part of a
    character.
    """

    end = None

    def decode(self, ids):
        """The text of ids. A character that they cut off at the end is left out."""
        return self.stream()(ids)

    def stream(self):
        """f(ids) -> the characters that these ids complete, for ids that come one by one. What is
        no UTF-8, and an id without a text, becomes U+FFFD; a character that lacks its end waits."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda ids: decoder.decode(
            b"".join(map(self.piece, np.asarray(ids).ravel().tolist()))
        )


class Characters(Encoding):
    """Each of `letters`, a str sorted by code point, is a token."""

    def __init__(self, letters):
        self.letters, self.size = letters, len(letters)
        self.points = _points(letters)

    def encode(self, text):
        points = _points(text)
        ids = np.searchsorted(self.points, points).clip(max=self.size - 1)
        wrong = np.flatnonzero(self.points[ids] != points)
        if len(wrong):
            raise DataError(f"{text[wrong[0]]!r} is none of the {self.size} letters of the "
                            "training text: leave it out")  # fmt: skip
        return ids.astype(np.min_scalar_type(self.size - 1))

    def piece(self, token):
        return self.letters[token].encode() if 0 <= token < self.size else UNKNOWN


class Bytes(Encoding):
    """Each byte of a text in UTF-8 is a token."""

    size = 256

    def encode(self, text):
        return np.frombuffer(_utf8(text), np.uint8)

    def piece(self, token):
        return bytes([token]) if 0 <= token < 256 else UNKNOWN


class Gpt2(Encoding):
    """GPT-2's byte pairs by the package tiktoken, which fetches them once. Raises DataError where
    it is not installed, or cannot fetch them. `<|endoftext|>` in a text is `end`."""

    size, end = 50257, 50256

    def __init__(self):
        try:
            import tiktoken
        except ImportError:
            raise DataError("GPT-2's encoding is that of the package tiktoken: pip install "
                            "tiktoken") from None  # fmt: skip
        try:
            self.coder = tiktoken.get_encoding("gpt2")
        except Exception as error:  # of the network, a damaged cache, a package that it lacks
            raise DataError(
                f"tiktoken cannot load GPT-2's encoding ({reason(error)[:90]}): it fetches two "
                "files once, so set TIKTOKEN_CACHE_DIR to a folder on a machine with a network, "
                "call tiktoken.get_encoding('gpt2') there, and copy that folder here"
            ) from error

    def encode(self, text):
        _utf8(text)
        return np.array(self.coder.encode(text, allowed_special="all"), np.uint16)

    def piece(self, token):
        try:
            return self.coder.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return UNKNOWN


def read_encoding(description):
    """The Encoding of {"kind": "characters", "letters": str}, {"kind": "bytes"} or {"kind":
    "gpt2"}, as logs and meta.json have it. Raises DataError for anything else."""
    if description is None:
        raise DataError("nothing tells the encoding of these tokens: they are known by number "
                        "alone")  # fmt: skip
    kind = description.get("kind") if isinstance(description, dict) else None
    if kind == "bytes":
        return Bytes()
    if kind == "gpt2":
        return Gpt2()
    letters = description.get("letters") if kind == "characters" else None
    if not isinstance(letters, str) or not letters or list(letters) != sorted(set(letters)):
        raise DataError(f"the encoding {str(description)[:SHOWN]} is neither bytes nor gpt2, nor "
                        "characters with their sorted letters")  # fmt: skip
    _utf8(letters)
    return Characters(letters)


def _points(text):
    """The code points of a str, uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _utf8(text):
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{text[error.start]!r} in a text is no character: type it in "
                        "UTF-8") from None  # fmt: skip
