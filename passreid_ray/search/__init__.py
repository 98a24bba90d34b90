"""Search: genomes in, genomes out. Fitness comes from outside; no Ray, no torch."""

from passreid_ray.search.cma_es import CmaEs
from passreid_ray.search.correlation import RankCorrelation, rank_correlation
from passreid_ray.search.genome import WeightSpace
from passreid_ray.search.individual import Individual
from passreid_ray.search.mu_lambda import MuLambda
from passreid_ray.search.strategy import Strategy

__all__ = ["CmaEs", "Individual", "MuLambda", "RankCorrelation", "Strategy", "WeightSpace", "rank_correlation"]
