"""The `jaxqkv` command. Heavy imports wait until the arguments are known to be good."""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jaxqkv.errors

FIGURES_EXAMPLE = """examples:
  jaxqkv figures qkv-weights --demo
  jaxqkv figures qkv-weights 2c 5b --model gpt2 random:gpt2 --theme dark --format svg"""


# Arguments that only some studies take; each study names its own.
STUDY_OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"nargs": "+", "help": "text instead of the study's own; several make a batch"},
    "text_file": {"nargs": "+", "type": Path, "metavar": "FILE", "help": "the same, each from a file"},
    "sentences": {"type": Path, "metavar": "FILE", "help": "sentences instead of the study's own, one a line"},
    "target": {"metavar": "WORD", "help": 'target token, with its leading space (default " her")'},
    "measure": {"choices": ("correlation", "cosine"), "help": "similarity to go on with (default correlation)"},
    "skip_missing": {"action": "store_true", "default": None, "help": "leave out sentences without the target"},
    "tokenizer": {"type": Path, "metavar": "FOLDER", "help": "tokenizer files, instead of the checkpoint's own"},
}


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    top = argparse.ArgumentParser(
        prog="jaxqkv",
        description="Look inside the attention of GPT-2 and BERT.",
        epilog="example:\n  jaxqkv figures qkv-weights --demo",
        **options,
    )
    top.add_argument("--version", action="store_true", help="print the version and those of its dependencies")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    figures = commands.add_parser(
        "figures", help="draw the figures of a study", description="Draw the figures of a study.",
        epilog=FIGURES_EXAMPLE, **options,
    )  # fmt: skip
    figures.set_defaults(action=_figures)
    figures.add_argument("study", metavar="STUDY", help="one of those that `jaxqkv list` names")
    figures.add_argument("ids", metavar="ID", nargs="*", help="figures to draw; all of the study unless given")
    figures.add_argument(
        "--model", nargs="+", metavar="SPEC", help="hub id, folder, demo-gpt2, demo-bert or random:SPEC"
    )
    figures.add_argument("--demo", action="store_true", help="use the bundled checkpoint that fits the study")
    figures.add_argument("--revision", help="branch, tag or commit on the hub")
    figures.add_argument("--layer", type=int, help="instead of the study's own layer")
    figures.add_argument("--seed", type=int, default=0, help="of everything random (default %(default)s)")
    stimuli = figures.add_argument_group("stimuli of some studies")
    for name, extra in STUDY_OPTIONS.items():
        stimuli.add_argument(f"--{name.replace('_', '-')}", **extra)
    figures.add_argument("--out", type=Path, default=Path("figures"), help="folder (default %(default)s)")
    figures.add_argument("--format", nargs="+", choices=("png", "svg", "pdf"), default=[], help="besides png")
    figures.add_argument("--theme", choices=("light", "dark"), default="light")
    figures.add_argument("--dpi", type=int, default=200, help="of the pictures (default %(default)s)")
    figures.add_argument("--arrays-only", action="store_true", help="write the .npz files and draw nothing")
    figures.add_argument("--no-compilation-cache", action="store_true", help="do not keep XLA's compiled programs")
    figures.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    listing = commands.add_parser(
        "list", help="list every figure", description="List every figure.", epilog="example:\n  jaxqkv list", **options
    )
    listing.set_defaults(action=_list)

    info = commands.add_parser(
        "info", help="describe a checkpoint", description="Describe a checkpoint without reading its weights.",
        epilog="example:\n  jaxqkv info demo-gpt2", **options,
    )  # fmt: skip
    info.set_defaults(action=_info)
    info.add_argument("spec", metavar="SPEC", help="hub id, folder, demo-gpt2, demo-bert or random:SPEC")
    info.add_argument("--revision", help="branch, tag or commit on the hub")
    info.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for an error, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    top = parser()
    options = top.parse_args(arguments)
    if options.version:
        print("\n".join(f"{name} {version}" for name, version in _versions().items()))
        return 0
    if options.command is None:
        top.print_help()
        return 2
    options.command_line = shlex.join(["jaxqkv", *arguments])
    try:
        options.action(options)
    except jaxqkv.errors.JaxqkvError as error:
        if options.debug:
            raise
        print(f"jaxqkv: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxqkv: interrupted; figures that were finished are whole", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `jaxqkv list | head`
        sys.stderr.close()
        return 0
    return 0


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"jaxqkv": jaxqkv.__version__} | {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")}


def _list(options: argparse.Namespace) -> None:
    from jaxqkv.figures.displays import Table
    from jaxqkv.figures.registry import STUDIES, study

    rows = [(name, spec.id, spec.title) for name in STUDIES for spec in study(name).figures.values()]
    for line in Table(heading=("study", "id", "figure"), rows=rows).text(align="left").splitlines():
        print(line.rstrip())


def _info(options: argparse.Namespace) -> None:
    from jaxqkv.checkpoint import open_checkpoint
    from jaxqkv.weights import Weights

    for name, value in Weights(open_checkpoint(options.spec, revision=options.revision)).summary().items():
        print(f"{name + ':':22}{value}")


def _figures(options: argparse.Namespace) -> None:
    from jaxqkv.figures import gallery
    from jaxqkv.figures.registry import study

    chosen = study(options.study)
    specs = chosen.select(options.ids)
    for name in STUDY_OPTIONS:
        if getattr(options, name) is not None and name not in chosen.options:
            raise jaxqkv.errors.JaxqkvError(f"{chosen.name} takes no --{name.replace('_', '-')}")
    if options.dpi < 1:
        raise jaxqkv.errors.JaxqkvError(f"--dpi {options.dpi}: expected a positive number")
    from jaxqkv import devices

    if not options.no_compilation_cache:
        devices.enable_compilation_cache()
    start = time.monotonic()
    run = chosen.run(options)
    folder = gallery.prepare_folder(options.out, chosen.name)
    print(f"{chosen.name}: {', '.join(entry['checkpoint'] for entry in _checkpoints(run))}", flush=True)
    run.prepare(frozenset().union(*(spec.needs for spec in specs)))
    computing, drawing, entries = time.monotonic() - start, 0.0, {}
    try:
        for spec in specs:
            begin = time.monotonic()
            try:
                display = spec.make(run)
            except jaxqkv.errors.NotDrawable as error:
                if spec.id in options.ids or len(specs) == 1:
                    raise
                print(f"jaxqkv: {spec.id} is not drawn: {error}", file=sys.stderr)
                continue
            if display.text:
                print(display.text)
            middle = time.monotonic()
            gallery.save_arrays(display, folder / f"{spec.id}.npz")
            files = [f"{spec.id}.npz"]
            if not options.arrays_only:
                formats = ["png", *(kind for kind in dict.fromkeys(options.format) if kind != "png")]
                files += [f"{spec.id}.{kind}" for kind in formats]
                gallery.save_picture(display, [folder / name for name in files[1:]], options.theme, options.dpi)
            computing += middle - begin
            drawing += time.monotonic() - middle
            entries[spec.id] = {"title": spec.title, "caption": display.caption, "files": files}
    finally:  # an interrupted run leaves a manifest of what it finished
        if entries:
            seconds = {"computing": round(computing, 3), "drawing": round(drawing, 3)}
            about = _about_run(options) | run.describe() | {"seconds": seconds}
            gallery.write_manifest(folder, chosen.name, about, entries)
            page = gallery.write_gallery(options.out)
    print(f"{len(entries)} figures in {folder}; computing {computing:.1f} s, drawing {drawing:.1f} s; see {page}")


def _checkpoints(run: Any) -> list[dict[str, Any]]:
    described = run.describe()["checkpoint"]
    return described if isinstance(described, list) else [described]


def _about_run(options: argparse.Namespace) -> dict[str, Any]:
    import jax

    device = jax.devices()[0]
    return {
        "command": options.command_line,
        "seed": options.seed,
        "dtype": "float32",
        "precision": jax.config.jax_default_matmul_precision or "highest",
        "device": f"{device.platform}: {device.device_kind}",
        "versions": _versions(),
    }


if __name__ == "__main__":
    sys.exit(main())
