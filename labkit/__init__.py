"""labkit: fine-tuning through the OpenAI SDK, on your own machine or at a provider.

    client = labkit.connect()                  a plain openai.OpenAI; the local service by default
    posts = labkit.posts()                     the lab's data: baseball and hockey posts, a DataFrame
    labkit.check("01.2", answer)               whether an exercise is solved, with a hint where it is not
    labkit.quiz("01")                          the quiz of a notebook
    labkit.prepare(file)                       what a training file lacks; fix="all" mends and writes it
    labkit.doctor()                            what is ready on this machine, and how to mend the rest
    labkit.watch(job)                          progress, time left and live loss curves
    labkit.metrics(job)                        a job's result file as a DataFrame
    labkit.classify(client, model, texts, labels)   labels with probabilities, many requests at once
    labkit.evaluate(truth, answers)            metrics with intervals; labkit.compare: McNemar between models
    labkit.ladder(rungs, train, test)          baselines and models on the same posts
    labkit.plan(…), labkit.sweep(…)            fine-tuning jobs over settings, sizes and seeds
    labkit.runs()                              every run recorded on this machine, a DataFrame
    labkit.memo(folder, title, …)              the one-page report

Names load when first used, so that `import labkit` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.checkup import doctor as doctor
    from labkit.client.baselines import Prompted as Prompted
    from labkit.client.baselines import ladder as ladder
    from labkit.client.classify import classify as classify
    from labkit.client.connect import connect as connect
    from labkit.client.data import posts as posts
    from labkit.client.evaluate import compare as compare
    from labkit.client.evaluate import evaluate as evaluate
    from labkit.client.iterate import plan as plan
    from labkit.client.iterate import sweep as sweep
    from labkit.client.jobs import metrics as metrics
    from labkit.client.jobs import plot_losses as plot_losses
    from labkit.client.jobs import watch as watch
    from labkit.client.leakage import split as split
    from labkit.client.memo import memo as memo
    from labkit.client.mistakes import mistakes as mistakes
    from labkit.client.runs import runs as runs
    from labkit.errors import LabkitError as LabkitError
    from labkit.examples.prepare import prepare as prepare
    from labkit.lessons.exercises import check as check
    from labkit.lessons.quiz import quiz as quiz

__version__ = "0.1.0"

_HOME_OF = {
    "LabkitError": "labkit.errors",
    "check": "labkit.lessons.exercises",
    "Prompted": "labkit.client.baselines",
    "classify": "labkit.client.classify",
    "compare": "labkit.client.evaluate",
    "connect": "labkit.client.connect",
    "evaluate": "labkit.client.evaluate",
    "ladder": "labkit.client.baselines",
    "memo": "labkit.client.memo",
    "doctor": "labkit.checkup",
    "metrics": "labkit.client.jobs",
    "mistakes": "labkit.client.mistakes",
    "plan": "labkit.client.iterate",
    "plot_losses": "labkit.client.jobs",
    "posts": "labkit.client.data",
    "prepare": "labkit.examples.prepare",
    "quiz": "labkit.lessons.quiz",
    "runs": "labkit.client.runs",
    "split": "labkit.client.leakage",
    "sweep": "labkit.client.iterate",
    "watch": "labkit.client.jobs",
}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"labkit has no {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
