"""The one console script: `jaxspec VERB ...` runs the program behind a verb."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from jaxspec import __version__
from jaxspec.console.cli import EXIT_USAGE, run
from jaxspec.console.programs import keep_programs


class Verb(NamedTuple):
    """A command of the console script."""

    module: str
    """Offers `main(argv) -> exit code`. It is imported only when the verb is called, so that help is instant."""
    help: str
    """The verb's line in `jaxspec --help`."""


VERBS = {
    "quickstart": Verb("jaxspec.infer.quickstart", "train a drafter for the bundled tiny model, then decode with it"),
    "generate": Verb("jaxspec.infer.generate", "answer prompts with a target, with or without a drafter"),
    "serve": Verb("jaxspec.infer.serve", "let clients of OpenAI's API and a page talk to a target and its drafter"),
    "configs": Verb("jaxspec.train.configs", "list the experiments, or show one with every field"),
    "pretrain": Verb("jaxspec.train.pretrain", "train a small target language model from scratch"),
    "instructions": Verb("jaxspec.train.instructions", "make user turns about passages of plain text"),
    "regenerate": Verb("jaxspec.train.regenerate", "let the target rewrite the answers of a data set"),
    "tokenize": Verb("jaxspec.train.tokenize_corpus", "tokenize a data set into sharded files on disk"),
    "features": Verb("jaxspec.train.features", "store the target's features, to train without its layers"),
    "draft-vocab": Verb("jaxspec.train.draft_vocab", "rank the tokens that a drafter needs to score"),
    "plan": Verb("jaxspec.train.plan", "compile a training run for a TPU slice that is not here: memory, time, cost"),
    "train": Verb("jaxspec.train.distill", "distill a frozen target into a drafter"),
    "runs": Verb("jaxspec.train.runs", "list runs: how far they are and the best tau they reached"),
    "export": Verb("jaxspec.train.export", "write a run's model, a drafter or a target in a format of other programs"),
    "import drafter": Verb("jaxspec.train.import_drafter", "convert a published drafter into one of jaxspec"),
    "import target": Verb("jaxspec.train.import_target", "convert a target of any size into one of jaxspec"),
    "import features": Verb("jaxspec.train.import_features", "make another project's hidden states a feature store"),
    "inspect": Verb("jaxspec.train.inspect", "say what a folder holds, and to which formats it exports"),
    "compare": Verb("jaxspec.train.compare", "train several recipes alike and compare the tau they reach"),
    "evaluate": Verb("jaxspec.infer.evaluate", "measure drafters and trees on a question set, task by task"),
    "check-served": Verb("jaxspec.infer.check_served", "hold a served drafter to the golden prompts of its export"),
    "report": Verb("jaxspec.infer.report", "write one page about evaluations, or the tables of a document"),
    "bench decode": Verb("jaxspec.infer.bench_decode", "time speculative against plain decoding, phase by phase"),
    "bench peers": Verb("jaxspec.infer.bench_peers", "time other libraries beside this one, on the same tokens"),
    "bench train": Verb("jaxspec.train.bench_train", "time and count a training step of several recipes, side by side"),
    "lab profile": Verb("jaxspec.infer.lab_profile", "measure a drafter's acceptance by depth and rank, for any tree"),
    "lab search": Verb("jaxspec.infer.lab_search", "find the draft tree of the most tokens per second"),
    "lab table": Verb("jaxspec.infer.lab_table", "find the best draft tree for every batch and context"),
    "lab check": Verb("jaxspec.infer.lab_check", "hold predictions to the clock: decode trees at several batches"),
    "lab report": Verb("jaxspec.infer.lab_report", "write one page about a search for draft trees, with its figures"),
    "bench device": Verb("jaxspec.infer.bench_device", "measure an accelerator within some minutes"),
    "lab cost": Verb("jaxspec.infer.lab_cost", "price the parts of a round: measured, compiled, or by the roofline"),
}

COMPILING = {"plan", "lab cost", "bench device"}
"""Verbs whose programs are compiled anew: for chips that are not there, whose programs cannot be read back, or to say
how long it takes."""

EXAMPLES = """\
examples:
  jaxspec quickstart
  jaxspec configs eagle2
  jaxspec train eagle2 optimizer.peak_lr=3e-4 --json runs/train.json
  jaxspec bench decode --help

Every verb explains its flags with --help and writes its result with --json PATH.
Exit codes: 0 done, 1 failed, 2 wrong usage, 75 preempted or another process lost (resume with the same command).
JAXSPEC_TRACEBACK=1 shows the traceback of a failure."""


def usage() -> str:
    """Returns the text of `jaxspec --help`."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    return f"usage: jaxspec VERB ...\n\nSpeculative decoding in JAX.\n\nverbs:\n{verbs}\n\n{EXAMPLES}\n"


def split_verb(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the verb that `argv` starts with, of one or two words, and the rest; None if it starts with no verb."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if len(argv) >= words and name in VERBS:
            return name, list(argv[words:])
    return None, list(argv)


def complain(argv: Sequence[str]) -> str:
    """Returns one sentence about an unknown verb, with the verbs that look like it."""
    words = [word for word in argv[:2] if not word.startswith("-")] or list(argv[:1])
    name = " ".join(words[:1] if words[0] not in {verb.split()[0] for verb in VERBS} else words)
    # A word of a verb names all that have it.
    close = [verb for verb in VERBS if name in verb.split()] or difflib.get_close_matches(name, VERBS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see jaxspec --help."
    return f"jaxspec: there is no verb {name!r}; {hint}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb named by `argv` (default: the command line); returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] in (["--help"], ["-h"]):
        sys.stdout.write(usage())
        return 0
    if argv == ["--version"]:
        sys.stdout.write(f"jaxspec {__version__}\n")
        return 0
    if not argv:
        sys.stderr.write(usage())
        return EXIT_USAGE
    name, rest = split_verb(argv)
    if name is None:
        sys.stderr.write(complain(argv))
        return EXIT_USAGE
    if name not in COMPILING:
        keep_programs()
    return run(lambda rest: importlib.import_module(VERBS[name].module).main(rest), rest, prog=f"jaxspec {name}")


if __name__ == "__main__":
    raise SystemExit(main())
