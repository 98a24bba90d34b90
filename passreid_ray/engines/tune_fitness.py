"""How good a trial's features look without labels: the fitness of ELo (arXiv:2002.12177)."""

from pathlib import Path

import torch

from passreid_ray.data import open_rows
from passreid_ray.engines.embedding import embed_rows
from passreid_ray.engines.loading import LoadConfig, load_model
from passreid_ray.engines.tune_config import LabelFreeConfig
from passreid_ray.engines.tune_jobs import JobConfig
from passreid_ray.errors import UserError
from passreid_ray.retrieval.label_free import label_free_score


def score_without_labels(config: JobConfig, label_free: LabelFreeConfig, seed: int) -> dict[str, float]:
    """``label_free/*`` of the newest checkpoint of the run of ``config``, on crops that it did not learn from.

    Of pre-training it is the teacher. Labels of the crops are not looked at.
    """
    source = label_free.data or config.evaluation.data
    if source is None:
        raise UserError("label_free.data: must be given, since the job has no evaluation.data")
    rows = open_rows(source)
    retrieval = config.evaluation.retrieval
    loaded = load_model(LoadConfig(checkpoint=Path(config.run.checkpoints.address)), retrieval.fusion)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded.model.to(device)
    features_ND, is_usable_N = embed_rows(
        loaded.model, rows, loaded.image_input, batch_size=retrieval.batch_size, device=device
    )
    score = label_free_score(
        features_ND[is_usable_N],
        num_clusters=label_free.num_clusters,
        prior=label_free.prior,
        exponent=label_free.exponent,
        seed=seed,
        num_starts=label_free.num_starts,
    )
    return score.as_metrics()
