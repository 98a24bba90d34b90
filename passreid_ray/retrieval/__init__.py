"""Features in, numbers out: distances, neighbours, clusters, ranking. No models, no Ray."""

from passreid_ray.retrieval.dbscan import dbscan_labels
from passreid_ray.retrieval.distances import cosine_distance
from passreid_ray.retrieval.jaccard import jaccard_distance
from passreid_ray.retrieval.label_free import LabelFreeScore, label_free_score
from passreid_ray.retrieval.neighbours import nearest_neighbours
from passreid_ray.retrieval.ranking import RankingResult, evaluate_ranking
from passreid_ray.retrieval.rerank import rerank

__all__ = [
    "LabelFreeScore",
    "RankingResult",
    "cosine_distance",
    "dbscan_labels",
    "evaluate_ranking",
    "jaccard_distance",
    "label_free_score",
    "nearest_neighbours",
    "rerank",
]
