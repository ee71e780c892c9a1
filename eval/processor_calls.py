"""Token ids of chat texts by a processor's own call, as many at once as it takes without changing them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_keeplora_eval.chat_text import mark_of, takes_videos
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.image_inputs import TOKEN_KEYS, ImageShapes, blank_image
from llava_keeplora_eval.video_inputs import Times, VideoShapes, blank_video, metadata
from llava_keeplora_recipes.records import Spans

#: What a model takes for each token of a text, by key.
Tokens = Mapping[str, list[int]]
#: Chat texts in one call at the most.
BATCH = 64


@dataclass(frozen=True)
class ChatText:
    """A chat text and what is shown with it.

    Args:
        text: as the chat template writes it.
        sizes: (height, width) of each image, frames of videos included.
        videos: spans of the frames of each video among the images; see `given_videos`.
        times: of each image, its time in its video and the video's length, or None; see `frame_time`.
        suffix: the answer, where the processor itself joins it with the question.
    """

    text: str
    sizes: tuple[tuple[int, int], ...]
    videos: Spans = ()
    times: tuple[tuple[float, float] | None, ...] = ()
    suffix: str | None = None


class TokenCalls:
    """Encode chat texts by a processor's own call.

    Texts with images of the same sizes share a call. Where the processor refuses several texts at once, pads
    them or makes other ids of them, each has a call of its own.

    Args:
        processor: of a vision-language model.
    """

    def __init__(self, processor):
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._by_size = copy.copy(processor)
        self._by_size.image_processor = ImageShapes(processor.image_processor)
        if takes_videos(processor):
            self._by_size.video_processor = VideoShapes.of(processor.video_processor)
        self._takes_several, self._compared = True, False

    def encode(self, texts: Iterable[ChatText]) -> dict[ChatText, Tokens | EvalError]:
        """Return the inputs for each token of chat texts, but for the attention mask, or why there are none.

        Args:
            texts: equal ones are encoded once.
        """
        found: dict[ChatText, Tokens | EvalError] = dict.fromkeys(texts, EvalError("", ""))
        groups: dict[Any, list[ChatText]] = {}
        for number, text in enumerate(found):
            alone = number if text.videos or not self._takes_several else None
            groups.setdefault((text.sizes, self._begun(text), text.suffix is None, alone), []).append(text)
        for group in groups.values():
            for start in range(0, len(group), BATCH):
                part = group[start : start + BATCH]
                found |= zip(part, self._together(part) or map(self._alone, part), strict=True)
        return found

    def _begun(self, text: ChatText) -> bool:
        # Some chat templates write the begin-of-text token that the tokenizer puts before every text too; it
        # goes there once.
        begin = self._tokenizer.bos_token
        return bool(begin) and text.text.startswith(begin)

    def _together(self, texts: Sequence[ChatText]) -> list[Tokens] | None:
        """Return the inputs for texts without videos by one call; None where each needs its own."""
        if len(texts) == 1 or not self._takes_several or any(map(self._wrong_marks, texts)):
            return None
        sizes = texts[0].sizes
        images = [[blank_image(*size) for size in sizes] for _ in texts] if sizes else None
        try:
            made = self._call(texts, images=images)
            padded = not all(map(all, made.get("attention_mask", ())))
            tokens = None if padded else [_tokens(made, row) for row in range(len(texts))]
        except Exception:  # Whatever it is, it is named by a call for one text, or does not happen there.
            tokens = None
        if tokens and not self._compared:
            self._compared, tokens = True, tokens if tokens[-1] == self._alone(texts[-1]) else None
        if tokens is None:
            self._takes_several = any(isinstance(self._alone(text), EvalError) for text in texts)
        return tokens

    def _alone(self, text: ChatText) -> Tokens | EvalError:
        """Return the inputs for one text, or what is wrong with it."""
        try:
            if wrong := self._wrong_marks(text):
                raise wrong
            return _tokens(self._call([text], **self._media(text)), 0)
        except EvalError as error:
            return error
        except (ValueError, TypeError, KeyError, IndexError) as error:
            return EvalError(
                f"the model's processor refuses a question with {len(text.sizes)} images "
                f"({str(error).splitlines()[0][:200] if str(error) else type(error).__name__})",
                "check that the processor's files and the model's config.json are of one checkpoint",
            )

    def _call(self, texts: Sequence[ChatText], **media: Any) -> Mapping[str, Any]:
        suffix = {} if texts[0].suffix is None else {"suffix": [text.suffix for text in texts]}
        written = [text.text for text in texts]
        return self._by_size(text=written, **media, add_special_tokens=not self._begun(texts[0]), **suffix)

    def _media(self, text: ChatText) -> dict[str, Any]:
        """Return blank images and videos of a text's sizes.

        Raises:
            EvalError: a video's frames have different sizes.
        """
        media = separate(text.sizes, text.videos, text.times)
        if any(len(set(frames)) > 1 for frames in media.get("videos", [])):
            raise EvalError(
                "the frames of a video have different sizes, and the model takes videos whole",
                "make the frames of each video of one size",
            )
        if media["images"]:
            media["images"] = [[blank_image(*size) for size in media["images"][0]]]
        if "videos" in media:
            media["videos"] = [blank_video(len(frames), *frames[0]) for frames in media["videos"]]
        return media

    def _wrong_marks(self, text: ChatText) -> EvalError | None:
        """Refuse a chat text that holds another number of tokens of images or videos than there are."""
        frames = sum(end - start for start, end in text.videos)
        counts = {"image": len(text.sizes) - frames} | ({"video": len(text.videos)} if text.videos else {})
        for kind, count in counts.items():
            token = mark_of(self._processor, kind)
            if (marked := text.text.count(token)) != count:
                return EvalError(
                    f"a question has {count} {kind}s and its chat text marks {marked} with {token}",
                    "remove the mark from the text of the question, the prompt or the chat template",
                )
        return None


def separate(images: Sequence, videos: Spans, times: Times) -> dict[str, Any]:
    """Return the arguments of a processor for an example's images and videos; see `ChatText`."""
    frames = {i for start, end in videos for i in range(start, end)}
    alone = [image for i, image in enumerate(images) if i not in frames]
    # Nested where the number of images makes a difference.
    media: dict[str, Any] = {"images": [alone] if alone else None}
    if videos:
        media["videos"] = [list(images[start:end]) for start, end in videos]
        media["video_metadata"] = [metadata(end - start, list(times[start:end])) for start, end in videos]
    return media


def _tokens(made: Mapping[str, Any], row: int) -> Tokens:
    return {
        key: list(map(int, made[key][row])) for key in TOKEN_KEYS if key in made and key != "attention_mask"
    }
