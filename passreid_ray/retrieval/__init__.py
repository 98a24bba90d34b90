"""Features in, numbers out: distances and ranking. No models, no Ray."""

from passreid_ray.retrieval.distances import cosine_distance
from passreid_ray.retrieval.ranking import RankingResult, evaluate_ranking

__all__ = ["RankingResult", "cosine_distance", "evaluate_ranking"]
