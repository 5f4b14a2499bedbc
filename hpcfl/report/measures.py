"""measures: what each accuracy of a run is: which model, when, on which images."""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

REFINING = {                                                       # what a step's refine does -> what clients do in it, in a word and in words
    "adopt": ("adopting", "adopting the server's model"),
    "finetune": ("fine-tuning", "fine-tuning"),
    "refine": ("refining", "refining on what the server made")}    # of a method that does not say
LOCAL = ("training", "local training")                             # what they do last where no step refines
Found = Mapping[str, Any]                                          # `report.summary` of a run


@dataclass(frozen=True)
class Measure:
    """An accuracy in `summary`'s accuracy: its column, the sentence that says what it is, and where to find it there."""

    key: str
    heading: str
    sentence: str
    select: Callable[[Found], Mapping[str, Any] | None]


def find_before_key(refine: str) -> str:
    """Where `summary` has the accuracy of the clients' models before they refine."""
    return f"before_{refine}"


def _before(accuracy: Found) -> Mapping[str, Any] | None:
    return accuracy.get(find_before_key(accuracy["refine"])) if accuracy["refine"] else None


MEASURES = {measure.key: measure for measure in (
    Measure("global", "global model", "what the federation itself holds after the last evaluated round, mean over its models, on the whole test set",
            lambda accuracy: accuracy.get("global")),
    Measure("generalization", "clients", "the model that each client holds at the end of that round, on the whole test set; "
            "mean over clients, lowest to highest",
            lambda accuracy: accuracy["generalization"]),
    Measure("before", "before", "the same clients before they did that: the models that they had trained themselves, on the whole test set", _before),
    Measure("personal", "own images", "the model that each client holds at the end, on held-out images of its own distribution",
            lambda accuracy: accuracy["personal"]),
    Measure("absent_classes", "absent classes", "the same model, only on test images of classes that the client has no training image of",
            lambda accuracy: accuracy["absent_classes"]))}
AFTER = "after"                                                    # the column that says what clients did last
AFTER_SENTENCE = "what clients did last in that round (adopting: they took over what the server made)"


def after_text(refine: str | None) -> str:
    """What clients did last in a round, in a word."""
    return (REFINING[refine] if refine else LOCAL)[0]


def after_all_text(refine: str | None) -> str:
    """What clients did last in a round, in words."""
    return (REFINING[refine] if refine else LOCAL)[1]


def describe_accuracies(accuracy: Found) -> dict[str, str]:
    """For each accuracy of a run that was measured, by its key in JSON: which model, when, on which images."""
    refine, everything, own = accuracy["refine"], "on the whole test set", "on held-out images of the client's own distribution"
    end = f"clients' models at the end of the round, after {after_all_text(refine)}"
    told = {"global": f"the federation's own models after the round, mean over models, {everything}", "generalization": f"{end}, {everything}",
            "personal": f"{end}, {own}", "absent_classes": f"{end}, on test images of classes that the client has no training image of"}
    if refine:
        told[find_before_key(refine)] = f"clients' models as they trained them, before {after_all_text(refine)}, {everything}"
    return {key: text for key, text in told.items() if accuracy.get(key) and accuracy[key]["mean"] is not None}


def choose_result(accuracy: Found, rounds: int, planned: int | None) -> dict[str, Any]:
    """Which accuracy is a run's result, and why: {"measure", "mean", "why"}; what a run has that is not finished is none yet."""
    key = "global" if (accuracy.get("global") or {}).get("mean") is not None else "generalization"
    why = "the method's own models, made for everybody" if key == "global" else "the method has no model but those of its clients"
    when = "at the end of a number of rounds fixed beforehand, so that nothing selected it" if planned is None or rounds >= planned else \
        f"but only {rounds} of {planned} rounds are finished"
    return {"measure": key, "mean": accuracy[key]["mean"], "why": f"{why}; {when}"}
