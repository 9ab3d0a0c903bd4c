"""What pages and pictures call a method."""

from experiments.evidence.arms import FULL, HISTORY, VECTORS, WITHOUT, retraining
from experiments.markdown import Results

NAMES = {
    "item_mean": "item's own rate",
    "popular_lately": "item's rate in the last week",
    "own_rate": "the user's own rate of the item",
    "bought_before": "what the user took before, counted with decay",
    "user_residual": "item's rate + one shrunk number a user",
    "logistic": "logistic regression on sums over the user's rows",
    "lightgbm": "LightGBM on sums over the user's rows",
    "global_mlp": "global MLP, not personalised",
    "wide_deep": "wide & deep with user ids",
    "dlrm": "DLRM with user and item ids",
    "history_mlp": "MLP on sums over the user's rows and fitted item vectors",
    "sasrec_daily": "SASRec, state of the day before",
    "sasrec_request": "SASRec, state at the request",
    "truth": "what the labels were drawn by",
    "shipped": "LiMAML as shipped",
    "newton": "LiMAML, Newton's step (the posterior)",
    "gradient": "LiMAML, gradient's step at MovieLens' searched rates",
    "hybrid": "LiMAML, one step from an encoder's start",
    "set": "encoder of the support, no gradient",
    "sequence": "LiMAML, transformer block",
    "pairwise": "LiMAML, half of the loss pairwise",
    "item": "LiMAML, items adapted, not users",
    "both": "LiMAML, users and items adapted",
    "paper": "LiMAML, the paper's form (one step at rate 0.3), stored",
    FULL: "LiMAML, the paper's form, adapted network kept whole",
    HISTORY: "LiMAML as shipped, sums over the user's rows in the stored vector",
    VECTORS: "LiMAML as shipped, with vectors of items' texts",
}


def name_of(title: str) -> str:
    """A method's, whatever features it has."""
    name = title.removesuffix(WITHOUT)
    fitted, _ = retraining(name)
    return NAMES[fitted] + name.removeprefix(fitted)


def with_features(title: str) -> str:
    return name_of(title) + (", without history features" if title.endswith(WITHOUT) else "")


def cadences(found: Results) -> Results:
    """Whose embeddings are refreshed at other cadences: of a world, and of ours where tastes drift faster and slower."""
    others = {f"{name_of('shipped')}, tastes halve in {days} days": by for days, by in found.get("by_drift", {}).items()}
    return {with_features(title): by for title, by in found["staleness"].items()} | others
