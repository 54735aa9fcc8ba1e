# SPDX-License-Identifier: Apache-2.0
"""The flags of ``submit``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from acestep_consumer.commands.base import (
    UsageError,
    check_task_id,
    exit_after,
    load_settings,
    note,
    print_warning,
)

BODY: Final = "Any field"
MUSIC: Final = "Music"
GENERATION: Final = "Generation"
AUDIO: Final = "Audio input"
FROM: Final = "Songs from songs"
QUEUE: Final = "Queue"
RESULT: Final = "Result"


def submit(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Request as a JSON file; `-` reads standard input.")
    ] = None,
    file_option: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="The same as FILE.", rich_help_panel=BODY)
    ] = None,
    form: Annotated[
        bool, typer.Option("--form", help="FILE is a form (`a=1&b=2`), not JSON.", rich_help_panel=BODY)
    ] = False,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any field of a request; may be repeated.", rich_help_panel=BODY
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Refuse wrong values, here and in the worker, in place of a warning.", rich_help_panel=BODY
        ),
    ] = False,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Description of the music.", rich_help_panel=MUSIC)
    ] = None,
    lyrics: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Lyrics; none: instrumental.", rich_help_panel=MUSIC)
    ] = None,
    lyrics_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Lyrics from a file; `-` reads standard input.", rich_help_panel=MUSIC),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(metavar="CODE", help="Language of the lyrics, such as `en` or `ja`.", rich_help_panel=MUSIC),
    ] = None,
    duration: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Length of a song, up to 600.", rich_help_panel=MUSIC)
    ] = None,
    bpm: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Beats per minute; the models were trained on 30 to 300.", rich_help_panel=MUSIC
        ),
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help='Key, such as "C major" or "F# minor".', rich_help_panel=MUSIC)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Number of songs, 1 to 8.", rich_help_panel=MUSIC)
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Make so many songs, 1 to 8, and keep the best; see --keep.", rich_help_panel=MUSIC
        ),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of the candidates, how many to keep; unset: 1.", rich_help_panel=MUSIC),
    ] = None,
    audio_format: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="NAME", help="mp3, wav, wav32, flac, ogg, opus or aac.", rich_help_panel=MUSIC
        ),
    ] = None,
    timestamps: Annotated[
        bool | None,
        typer.Option(
            "--timestamps/--no-timestamps",
            help="Find when each line is sung: .lrc and .vtt files, and the event.",
            rich_help_panel=MUSIC,
        ),
    ] = None,
    loudness: Annotated[
        float | None,
        typer.Option(
            metavar="LUFS",
            help="Loudness to bring each song to, -70 to -5; streaming services play at -14.",
            rich_help_panel=MUSIC,
        ),
    ] = None,
    true_peak: Annotated[
        float | None,
        typer.Option(
            metavar="DB",
            help="With --loudness: the peak that it must not exceed, -20 to 0; unset: -1.",
            rich_help_panel=MUSIC,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="DiT model; unset: the worker's primary.", rich_help_panel=GENERATION),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="LoRA: a name, or s3://bucket/key.safetensors; may be repeated.",
            rich_help_panel=GENERATION,
        ),
    ] = None,
    lora_scale: Annotated[
        list[float] | None,
        typer.Option(
            metavar="N", help="Strength of the LoRA, -4 to 4; one for each --lora.", rich_help_panel=GENERATION
        ),
    ] = None,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="Plan with the 5Hz LM.", rich_help_panel=GENERATION),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Denoising steps, 1 to 200.", rich_help_panel=GENERATION)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(metavar="N", help="Classifier-free guidance scale, 0 to 30.", rich_help_panel=GENERATION),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Seed: the same one gives the same song.", rich_help_panel=GENERATION),
    ] = None,
    task_type: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="text2music, cover, cover-nofsq, repaint, extract, lego or complete.",
            rich_help_panel=AUDIO,
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Audio to work on: s3://bucket/key or https://….", rich_help_panel=AUDIO),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Audio whose timbre to follow: s3:// or https://.", rich_help_panel=AUDIO),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="TASK_ID",
            help="Task whose song is worked on, in place of --source.",
            rich_help_panel=FROM,
        ),
    ] = None,
    from_index: Annotated[
        int | None,
        typer.Option(metavar="N", help="Which of its songs, from 0; unset: the first.", rich_help_panel=FROM),
    ] = None,
    extend_left: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Add so much before the song.", rich_help_panel=FROM)
    ] = None,
    extend_right: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Add so much after the song.", rich_help_panel=FROM)
    ] = None,
    replace_lines: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW",
            help="Sing a line anew; may be repeated. Its song needs times: --timestamps.",
            rich_help_panel=FROM,
        ),
    ] = None,
    variation: Annotated[
        float | None,
        typer.Option(metavar="N", help="Make the song again: 0 is the same, 1 another one.", rich_help_panel=FROM),
    ] = None,
    stems: Annotated[
        bool | None,
        typer.Option("--stems", help="Every track of the song, a file each (base models).", rich_help_panel=FROM),
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="`draft`, or `final`: with --from, that draft well made.", rich_help_panel=FROM
        ),
    ] = None,
    task_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Idempotency key; unset: a new one.", rich_help_panel=QUEUE)
    ] = None,
    priority: Annotated[
        int, typer.Option(min=0, max=9, metavar="N", help="0 to 9; 9 goes first.", rich_help_panel=QUEUE)
    ] = 0,
    on_limit: Annotated[
        str | None,
        typer.Option(
            metavar="ACTION",
            help="`clamp` or `reject` a request that exceeds the GPU tier's limits.",
            rich_help_panel=QUEUE,
        ),
    ] = None,
    expires: Annotated[
        float | None,
        typer.Option(
            min=0.001, metavar="SECONDS", help="Longest wait in the queue; then it expires.", rich_help_panel=QUEUE
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the result, with a progress bar.", rich_help_panel=RESULT)
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="SECONDS", help="Longest wait for the result; implies --wait.", rich_help_panel=RESULT
        ),
    ] = None,
    download: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", file_okay=False, help="Download the songs; implies --wait.", rich_help_panel=RESULT
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one line of JSON, described above.", rich_help_panel=RESULT),
    ] = False,
) -> None:
    """Submit a request.

    The request comes from flags, a file, or both (flags win, then `--set`). It is checked first; one that a worker
    would reject is not sent (exit code 2), nor is one with a wrong value of a flag, or with `--strict` any wrong value.
    `acestep-consumer check` says what a worker of a given tier makes of it.

    A song can come from an earlier one, by its task id:

    - `submit --from first-take --extend-right 30` – 30 seconds more
    - `submit --from first-take --variation 0.3` – nearly the same song
    - `submit --from first-take --replace-lines "old line=new line"` – the rest stays as it is
    - `submit --from first-take --replace-lines '{"section": "verse 2", "lyrics": "…"}'`
    - `submit --prompt "slow jazz" --quality draft`, then `submit --from DRAFT --quality final`

    Prints the task id, and on a terminal the position in the queue and when to expect the songs. That is an estimate
    from the queue and the latest jobs; requests with a higher priority can delay it.

    With `--json`: `task_id`, `position` (1 is next, 0 is in progress), `in_hand` (jobs in progress), `workers`,
    `expected_s` and `note`. Unknown values are null, and `note` says why. With `--wait --json`: the terminal event.
    """
    from acestep_consumer.commands.submit import run  # noqa: PLC0415 - the other commands start faster so

    if file is not None and file_option is not None:
        raise UsageError("FILE and --file exclude each other")
    flags: dict[str, object] = {
        "task_id": task_id,
        "prompt": prompt,
        "lyrics": lyrics,
        "vocal_language": language,
        "audio_duration": duration,
        "bpm": bpm,
        "key_scale": key,
        "batch_size": batch_size,
        "candidates": candidates,
        "keep": keep,
        "audio_format": audio_format,
        "timestamps": timestamps,
        "loudness_lufs": loudness,
        "true_peak_db": true_peak,
        "model": model,
        "thinking": thinking,
        "inference_steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
        "task_type": task_type,
        "src_audio_path": source,
        "reference_audio_path": reference,
        "source_task_id": from_,
        "source_index": from_index,
        "extend_left_s": extend_left,
        "extend_right_s": extend_right,
        "variation": variation,
        "stems": stems,
        "quality": quality,
        "on_limit": on_limit,
    }
    options = run.SubmitOptions(
        _checked_body(
            BodySources(
                file=file or file_option,
                form=form,
                sets=tuple(sets or ()),
                lyrics=lyrics_file,
                replaced=tuple(replace_lines or ()),
                loras=tuple(lora or ()),
                lora_scales=tuple(lora_scale or ()),
            ),
            flags,
            strict=strict,
        ),
        priority=priority,
        expires_s=expires,
        wait=wait or download is not None or timeout is not None,
        timeout_s=timeout,
        download=download,
        as_json=as_json,
    )
    exit_after(run.submit(load_settings(), options, note))


@dataclass(frozen=True, slots=True, kw_only=True)
class BodySources:
    """Sources of a request besides the flags of single fields."""

    file: Path | None
    form: bool
    sets: tuple[str, ...]
    lyrics: Path | None
    replaced: tuple[str, ...]
    loras: tuple[str, ...]
    lora_scales: tuple[float, ...]


def _checked_body(sources: BodySources, flags: dict[str, object], *, strict: bool) -> dict[str, object]:
    """Return the request; prints warnings, and raises a usage error for what a worker would reject."""
    from acestep_consumer.commands.submit import request  # noqa: PLC0415 - as above

    if isinstance(flags["task_id"], str):
        check_task_id(flags["task_id"])
    file = sources.file
    try:
        if sources.lyrics is not None:
            if flags["lyrics"] is not None:
                raise UsageError("--lyrics and --lyrics-file exclude each other")
            if file == sources.lyrics == request.STDIN:
                raise UsageError("only one of request and lyrics can come from standard input")
            flags["lyrics"] = request.read_text(sources.lyrics)
        flags |= request.line_fields(sources.replaced) | request.lora_fields(sources.loras, sources.lora_scales)
        read = request.read_form if sources.form else request.read_json
        body = request.merge({} if file is None else read(file), request.assignments(sources.sets))
        body = request.merge(body, flags)
        if not body:
            raise UsageError("give a JSON file, or at least --prompt")
        if strict:
            body["strict"] = True
        from_flags = frozenset(field for field, value in flags.items() if value is not None)
        for warning in request.check(body, from_flags, strict=strict):
            print_warning(warning)
    except request.RequestRefused as error:
        raise UsageError(str(error)) from error
    return body
