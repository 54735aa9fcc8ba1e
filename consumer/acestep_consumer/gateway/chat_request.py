# SPDX-License-Identifier: Apache-2.0
"""Reads the body of ``/v1/chat/completions`` as a request for one song. Pure."""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from acestep_consumer.domain.tasks import SOURCE_TASKS
from acestep_consumer.gateway.answers import ApiError

INSTRUMENTAL: Final = "[inst]"

_SAME_NAME: Final = (
    *("task_type", "repainting_start", "repainting_end", "audio_cover_strength", "inference_steps", "infer_method"),
    *("guidance_scale", "thinking", "sample_mode", "use_format", "use_cot_caption", "use_cot_language"),
    *("track_name", "track_classes", "instruction", "lora", "loras"),
)
_RENAMED: Final = {"temperature": "lm_temperature", "top_p": "lm_top_p", "top_k": "lm_top_k"}
_AUDIO_CONFIG: Final = {
    "duration": "audio_duration",
    "format": "audio_format",
    "bpm": "bpm",
    "key_scale": "key_scale",
    "time_signature": "time_signature",
    "vocal_language": "vocal_language",
}
_TAG: Final = {name: re.compile(rf"<{name}>(.*?)</{name}>", re.IGNORECASE | re.DOTALL) for name in ("prompt", "lyrics")}
_SECTION: Final = re.compile(r"\[\s*(verse|chorus|bridge|intro|outro|hook|pre-chorus|refrain|interlude)", re.IGNORECASE)
_VERSE_LINES: Final = 4
_SHORT_LINE: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A song that is asked for in a chat.

    Attributes:
        model: as the client named it.
        fields: of the request.
        audios: encoded audio with a suffix, by the field that it is for.
        stream: whether the answer is to be sent in pieces.
    """

    model: str
    fields: Mapping[str, object]
    audios: Mapping[str, tuple[bytes, str]]
    stream: bool


def read_chat(body: Mapping[str, Any]) -> ChatRequest:
    """Read a body. Raises ``ApiError`` (400) where it asks for nothing."""
    text, audios = _last_user_message(body.get("messages"))
    config = body.get("audio_config")
    config = config if isinstance(config, Mapping) else {}
    fields = {name: body[name] for name in _SAME_NAME if body.get(name) is not None}
    fields |= {ours: body[name] for name, ours in _RENAMED.items() if body.get(name) is not None}
    fields |= {ours: config[name] for name, ours in _AUDIO_CONFIG.items() if config.get(name) is not None}
    fields |= _texts(body, text, instrumental=config.get("instrumental") is True)
    if body.get("seed") is not None:
        fields |= {"seed": body["seed"], "use_random_seed": False}
    sources = str(body.get("task_type") or "text2music") in SOURCE_TASKS
    if not any(fields.get(name) for name in ("prompt", "lyrics", "sample_query")) and not (sources and audios):
        raise ApiError(HTTPStatus.BAD_REQUEST, "No valid prompt, lyrics or sample query in the last user message")
    model = str(body.get("model") or "")
    if model:
        fields["model"] = model.rpartition("/")[2]
    names = ("src_audio_path", "reference_audio_path") if sources else ("reference_audio_path",)
    return ChatRequest(
        model=model,
        # The answer holds one song, whatever is asked for.
        fields=fields | {"batch_size": 1},
        audios=dict(zip(names, audios, strict=False)),
        stream=body.get("stream") is True,
    )


def _texts(body: Mapping[str, Any], text: str, *, instrumental: bool) -> dict[str, object]:
    """Return caption, lyrics or query."""
    given = body.get("lyrics")
    if body.get("sample_mode"):
        return {"sample_query": text} | ({"lyrics": given} if given else {})
    if given:
        found: dict[str, object] = {"prompt": text, "lyrics": given}
    else:
        found = _split(text)
    if instrumental and not found.get("lyrics"):
        found["lyrics"] = INSTRUMENTAL
    return found


def _split(text: str) -> dict[str, object]:
    tagged = {name: match[1].strip() for name, tag in _TAG.items() if (match := tag.search(text)) is not None}
    if tagged:
        return dict(tagged)
    return {"lyrics": text} if _looks_like_lyrics(text) else {"prompt": text}


def _looks_like_lyrics(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    short = all(len(line) <= _SHORT_LINE for line in lines)
    return bool(_SECTION.search(text)) or (len(lines) >= _VERSE_LINES and short)


def _last_user_message(messages: object) -> tuple[str, list[tuple[bytes, str]]]:
    """Return the text and the audios of the last message of the user. Raises ``ApiError`` (400)."""
    if not isinstance(messages, list):
        raise ApiError(HTTPStatus.BAD_REQUEST, "messages must be a list")
    for message in reversed(messages):
        if isinstance(message, Mapping) and message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                return content.strip(), []
            parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
            texts = [str(part.get("text") or "") for part in parts if part.get("type") == "text"]
            return "\n".join(texts).strip(), list(_audios(parts))
    raise ApiError(HTTPStatus.BAD_REQUEST, "messages hold none of role user")


def _audios(parts: list[Mapping[str, Any]]) -> Iterator[tuple[bytes, str]]:
    for part in parts:
        audio = part.get("input_audio")
        if part.get("type") != "input_audio" or not isinstance(audio, Mapping):
            continue
        text = str(audio.get("data") or "")
        text = text.partition(",")[2] if text.startswith("data:") else text
        try:
            content = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            continue  # as ACE-Step's server does
        suffix = str(audio.get("format") or "mp3").lower()
        if content:
            yield content, f".{suffix}" if re.fullmatch(r"[a-z0-9]{1,4}", suffix) else ""
