"""labkit: fine-tuning through the OpenAI SDK, on your own machine or at a provider.

    client = labkit.connect()                  a plain openai.OpenAI; the local service by default
    posts = labkit.posts()                     the lab's data: baseball and hockey posts, a DataFrame
    labkit.check(file)                         what a fine-tuning job would find wrong with a file
    labkit.doctor()                            what is ready on this machine, and how to mend the rest
    labkit.watch(job)                          progress, time left and live loss curves
    labkit.metrics(job)                        a job's result file as a DataFrame
    labkit.classify(client, model, texts, labels)   labels with probabilities, many requests at once

Names load when first used, so that `import labkit` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.checkup import doctor as doctor
    from labkit.client.classify import classify as classify
    from labkit.client.connect import connect as connect
    from labkit.client.data import posts as posts
    from labkit.client.jobs import metrics as metrics
    from labkit.client.jobs import plot_losses as plot_losses
    from labkit.client.jobs import watch as watch
    from labkit.errors import LabkitError as LabkitError
    from labkit.examples import check as check

__version__ = "0.1.0"

_HOME_OF = {
    "LabkitError": "labkit.errors",
    "check": "labkit.examples",
    "classify": "labkit.client.classify",
    "connect": "labkit.client.connect",
    "doctor": "labkit.checkup",
    "metrics": "labkit.client.jobs",
    "plot_losses": "labkit.client.jobs",
    "posts": "labkit.client.data",
    "watch": "labkit.client.jobs",
}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"labkit has no {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
