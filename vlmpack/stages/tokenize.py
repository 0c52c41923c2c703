"""Tokenise: rows -> samples whose exact cost is known, with no pixel decoded.

`VQADataset` is the first stage: it reads rows, takes image sizes from headers, renders the chat
template, tokenises ONCE, marks what the assistant wrote, and splices in the image tokens.
"""

from __future__ import annotations

import logging
import zlib
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch.utils.data import IterableDataset

from vlmpack.errors import ConfigError, SampleError
from vlmpack.geometry import Tiling
from vlmpack.images import MAX_PIXELS
from vlmpack.samples import Message, Refusal, Row, Sample
from vlmpack.stages.placeholders import IGNORE_INDEX, ImageTokens, cost_of, retile, splice
from vlmpack.stages.rows import RatingMinima, RowParser
from vlmpack.stages.source import RowSource
from vlmpack.stages.template import ChatTemplate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import numpy.typing as npt
    from PIL.Image import Image
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

    from vlmpack.geometry import ImageGeometry, ImageRule
    from vlmpack.stages.placeholders import Placeholders
    from vlmpack.stages.source import SourceState
    from vlmpack.stages.template import Span

logger = logging.getLogger(__name__)


class ModelFamily(Protocol):
    """What this stage and the assembler ask of a family of `vlmpack.families`."""

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> tuple[ImageRule, Placeholders]:
        """Return the rule with this tokenizer's lengths, and its image tokens."""
        ...

    def cut(self, picture: Image, geometry: ImageGeometry, out: npt.NDArray[np.uint8]) -> None:
        """Write what the vision encoder takes, uint8 [N, P, P, 3]."""
        ...


class VQADataset(IterableDataset["Sample | Refusal"]):
    """Samples of a data set: tokenised, with exact costs, images still compressed.

    Iterating yields a `Sample` or a `Refusal` for each row, in order; each row is read by exactly one
    worker of a DataLoader. Indexing works where the data set has a length.

    Labels are the tokens of assistant turns, unshifted (the Hugging Face convention), -100 elsewhere.
    Images stand where the text has the image marker, or before the first user turn where it has none.

    Args:
        dataset: A Hugging Face data set (map-style or streaming), a list of rows, or an iterable of rows;
            the columns are described in `vlmpack.stages.rows`.
        tokenizer: A fast Hugging Face tokenizer that has the image tokens (see `add_image_tokens`).
        tiling: How images are cut; `Tiling()` where neither this nor a family is given.
        family: A family of `vlmpack.families`, instead: its sizes, its tokens, its pixels.
        chat_template: Instead of the tokenizer's own.
        template_options: Variables for the chat template.
        image_marker: What stands for an image in the text; None if nothing does.
        image_root: The folder that image paths in the data may lead into.
        key_column: The column that names a row; its position where None.
        ratings: Least ratings of a turn.
        max_pixels: Images with more pixels are refused.
        splits_itself: Whether a plain iterable gives each worker its own part.
        shuffle_seed: Shuffle the rows, another way in each epoch, so that a position can be saved; None
            leaves them in order.
        shuffle_window: Rows of a stream that are shuffled together; a data set with a length is shuffled
            as a whole.

    Raises:
        ConfigError: If the tokenizer has no image tokens, no chat template, or no offsets; if both a tiling
            and a family are given, or a family by its name.
    """

    def __init__(
        self,
        dataset: object,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tiling: Tiling | None = None,
        family: ModelFamily | None = None,
        chat_template: str | None = None,
        template_options: Mapping[str, object] | None = None,
        image_marker: str | None = "<image>",
        image_root: str | Path | None = None,
        key_column: str | None = None,
        ratings: RatingMinima | None = None,
        max_pixels: int = MAX_PIXELS,
        splits_itself: bool = False,
        shuffle_seed: int | None = None,
        shuffle_window: int = 1024,
    ) -> None:
        if not tokenizer.is_fast:
            raise ConfigError("labels need character offsets, which only a fast tokenizer has (is_fast)")
        self.tokenizer = tokenizer
        self.family = family
        self.tiling: ImageRule
        self.image_tokens: Placeholders
        if family is None:
            self.tiling = tiling or Tiling()
            self.image_tokens = ImageTokens.of(tokenizer, tiling or Tiling())
        else:
            _check_family(family, tiling)
            self.tiling, self.image_tokens = family.for_tokenizer(tokenizer)
        self.max_pixels = max_pixels
        self._source = RowSource(
            dataset,
            key_column=key_column,
            splits_itself=splits_itself,
            shuffle_seed=shuffle_seed,
            shuffle_window=shuffle_window,
        )
        self._parse = RowParser(
            image_marker=image_marker, image_root=image_root, ratings=ratings, max_pixels=max_pixels
        )
        # A template knows the tokens of its own model; those of a tiling are this library's.
        image = (self.image_tokens.in_message, self.image_tokens.text) if family is not None else None
        self._template = ChatTemplate(tokenizer, chat_template, template_options, image)
        self._settings = repr((
            self.tiling,
            image_marker,
            ratings,
            max_pixels,
            chat_template,
            template_options,
        ))
        self._warned_of_image_token = False
        self.num_texts_with_image_token = 0
        """Texts out of which an image token was removed, in this process."""

    @property
    def num_rows(self) -> int | None:
        """Rows of the data set, None for a stream."""
        return self._source.num_rows

    def __iter__(self) -> Iterator[Sample | Refusal]:
        return (item for item in self.samples() if item is not None)

    def samples(self, wanted: Iterable[bool] = ()) -> Iterator[Sample | Refusal | None]:
        """Yield what becomes of each row, None for one that is not wanted, which costs only its reading.

        Args:
            wanted: Whether the first rows are wanted, in order; all behind them are.
        """
        is_wanted = iter(wanted)
        for item in self._source:
            if not next(is_wanted, True):
                yield None
            else:
                yield item if isinstance(item, Refusal) else self._sample_or_refusal(*item)

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the data the next one is.

        Args:
            epoch: From 0; a shuffled data set comes in another order in each.
        """
        self._source.set_epoch(epoch)

    def state_dict(self) -> SourceState:
        """Return where the latest pass stands, behind the sample that came last.

        Raises:
            ConfigError: If the place in this data set could not be found again.
        """
        return self._source.state_dict()

    def load_state_dict(self, state: SourceState | None) -> None:
        """Begin the next pass behind the sample that came last when the state was saved.

        Args:
            state: From `state_dict`, over the same data; None forgets one that was loaded.
        """
        self._source.load_state_dict(state)

    def digests(self) -> dict[str, str]:
        """Return what tells the data, the tokenizer and the reading of rows from others."""
        return {
            "data set": self._source.digest(),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "rows, tiling or chat template": f"{zlib.crc32(self._settings.encode()):08x}",
        }

    def __getitem__(self, index: int) -> Sample | Refusal:
        """Return the sample or the refusal of one row.

        Args:
            index: Position in a data set that has a length.

        Raises:
            ConfigError: If the data set is a stream.
            IndexError: If there is no such row.
        """
        item = self._source.row(index)
        return item if isinstance(item, Refusal) else self._sample_or_refusal(*item)

    def retile(self, sample: Sample, tiling: ImageRule) -> Sample:
        """Return the sample with its images cut by another rule; the text stays."""
        return retile(sample, self.image_tokens, tiling)

    def sample(self, row: Row) -> Sample:
        """Tokenise one row. O(tokens).

        Args:
            row: With at least one message.

        Raises:
            SampleError: If no token would be supervised, or the chat template cannot be traced.
        """
        text, spans = self._template.render(self._place_images(row))
        if any(self.image_tokens.around):
            text, spans = surround(text, spans, self.image_tokens.text, self.image_tokens.around)
        ids, supervised = self._encode(text, spans)
        is_image = ids == self.image_tokens.anchor
        if np.count_nonzero(is_image) != len(row.images):
            raise SampleError(
                "template_untraceable",
                f"the chat template shows {np.count_nonzero(is_image)} of {len(row.images)} images; it "
                "must keep the content of every message",
                num_images=len(row.images),
            )
        labels = np.where(supervised & ~is_image, ids, IGNORE_INDEX)
        if not (labels[1:] != IGNORE_INDEX).any():  # position 0 is never a target
            raise SampleError(
                "no_supervised_token",
                "no token would be supervised: there is no assistant turn, or the template marks none",
            )
        geometries = self.tiling.sample([(image.height, image.width) for image in row.images])
        blocks = [self.image_tokens.block(geometry) for geometry in geometries]
        cuts = [(int(at), int(at) + 1) for at in np.flatnonzero(is_image)]
        input_ids, starts = splice(ids, blocks, cuts)
        labels, _ = splice(labels, [np.full_like(block, IGNORE_INDEX) for block in blocks], cuts)
        return Sample(
            key=row.key,
            input_ids=input_ids,
            labels=labels,
            images=row.images,
            geometries=geometries,
            image_starts=starts,
            cost=cost_of(input_ids, geometries),
        )

    def _sample_or_refusal(self, key: str, raw: object) -> Sample | Refusal:
        try:
            return self.sample(self._parse(key, raw))
        except SampleError as error:
            return Refusal.of(key, error)

    def _place_images(self, row: Row) -> list[Message]:
        """Return the messages with one image token where each image belongs, and nowhere else."""
        marker, token = self._parse.image_marker, self.image_tokens.in_message
        has_markers = marker is not None and any(marker in message.content for message in row.messages)
        placed = []
        for message in row.messages:
            if has_markers and marker is not None:
                content = token.join(self._clean(part, row.key) for part in message.content.split(marker))
            else:
                content = self._clean(message.content, row.key)
            placed.append(Message(role=message.role, content=content))
        if row.images and not has_markers:
            first = next((i for i, message in enumerate(placed) if message.role == "user"), 0)
            several = len(row.images) > 1
            # The reference pipeline numbers several images; a single one has no number.
            before = "".join(f"<image: {i}>" * several + token for i in range(len(row.images)))
            placed[first] = Message(role=placed[first].role, content=before + placed[first].content)
        return placed

    def _clean(self, text: str, key: str) -> str:
        """Return the text without any image token of the tokenizer: only real images may have one."""
        clean = self.image_tokens.removed_from(text)
        if clean != text:
            self.num_texts_with_image_token += 1
            if not self._warned_of_image_token:
                self._warned_of_image_token = True
                logger.warning(
                    "row %s has an image token of the tokenizer in its text; it is removed, as it would "
                    "stand for an image that does not exist. Further cases are counted in "
                    "num_texts_with_image_token.",
                    key,
                )
        return clean

    def _encode(self, text: str, spans: list[Span]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return int64 [T] ids and bool [T]: whether the token lies inside one of the spans."""
        encoding = _encode_whole(self.tokenizer.backend_tokenizer, text)
        ids = np.array(encoding.ids, np.int64)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        start_T, stop_T = offsets[:, 0], offsets[:, 1]
        inside = np.zeros(len(ids), bool)
        for start, stop in spans:
            # A token that reaches over an edge is not supervised: half of it is not the assistant's.
            # Except for spaces before the first word, of which most tokenizers make one token.
            # Tokenizers that trim offsets leave tokens of spaces empty; inside the span they count.
            first = start
            while first and text[first - 1] == " ":
                first -= 1
            inside |= (start_T >= first) & (stop_T <= stop) & (stop_T > start)
        return ids, inside


def _check_family(family: ModelFamily, tiling: Tiling | None) -> None:
    if tiling is not None:
        raise ConfigError("a family cuts images by its own rule: pass tiling= or family=, not both")
    if not hasattr(family, "for_tokenizer"):
        raise ConfigError(
            f"family must be one of vlmpack.families, got {family!r}; pass "
            "vlmpack.families.family_for(...) of a model type, a model's config or a name"
        )


def surround(text: str, spans: list[Span], token: str, around: tuple[str, str]) -> tuple[str, list[Span]]:
    """Put something before and after each image token; what an assistant wrote moves along. O(text).

    Args:
        text: A rendered conversation.
        spans: Of it, ascending.
        token: The image token.
        around: What to put before and after it.
    """
    before, after = around
    pieces = text.split(token)
    starts, at = [], 0
    for piece in pieces[:-1]:
        at += len(piece)
        starts.append(at)
        at += len(token)

    def moved(position: int) -> int:
        passed = sum(start < position for start in starts)  # tokens that begin before this position
        return position + passed * (len(before) + len(after))

    return (before + token + after).join(pieces), [(moved(start), moved(stop)) for start, stop in spans]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what tells a tokenizer from others: its size, tokens of its own, template, and a text's ids.

    Args:
        tokenizer: A fast one.
    """
    probe = "".join(map(chr, (*range(32, 0x250), *range(0x4E00, 0x4E40)))) + " The cats' 12,345 photographs."
    described = [
        len(tokenizer),
        sorted(tokenizer.get_added_vocab().items()),
        tokenizer.chat_template,
        _encode_whole(tokenizer.backend_tokenizer, probe).ids,
    ]
    return f"{zlib.crc32(repr(described).encode()):08x}"


def _encode_whole(backend: Tokenizer, text: str) -> Encoding:
    """Tokenise without the truncation, the padding or the split tokens that an earlier call left on."""
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens:
        backend.encode_special_tokens = False
    return backend.encode(text, add_special_tokens=False)
