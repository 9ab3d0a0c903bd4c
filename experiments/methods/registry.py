"""All methods by name."""

from experiments.methods.fitted import Fit
from experiments.methods.full_network import full
from experiments.methods.history_mlp import history_mlp
from experiments.methods.networks import global_mlp, user_id
from experiments.methods.rates import item_mean, user_level
from experiments.methods.stored_embedding import stored
from experiments.methods.stored_with_history import history
from experiments.methods.tabular import boosted, logistic

METHODS: dict[str, Fit] = {
    "item_mean": item_mean,
    "user_level": user_level,
    "logistic": logistic,
    "lightgbm": boosted,
    "global_mlp": global_mlp,
    "user_id": user_id,
    "history_mlp": history_mlp,
    "stored": stored,
    "full": full,
    "row_mlp": stored,
    "id_mlp": stored,
    "history": history,
}
