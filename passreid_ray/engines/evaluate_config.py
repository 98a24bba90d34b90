"""Settings of the evaluation job."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from passreid_ray.config import Section, UserPath
from passreid_ray.data import Source, SyntheticSource
from passreid_ray.engines.features import FeatureConfig
from passreid_ray.engines.scoring import RetrievalConfig
from passreid_ray.retrieval.candidate_sets import ScoreOfIdentity


class ExpansionConfig(Section):
    """Features averaged with those of their neighbours before they are compared."""

    query_neighbours: int = Field(default=0, ge=0)
    """Average query expansion: gallery images that are averaged with a query; 0: none."""
    gallery_neighbours: int = Field(default=0, ge=0)
    """Database-side augmentation: gallery images that are averaged with each of them; 0: none."""
    alpha: float = Field(default=0.0, ge=0)
    """Neighbours weigh similarity to this power; 0: all alike."""


class RerankConfig(Section):
    """k-reciprocal re-ranking (arXiv:1701.08398)."""

    enabled: bool = False
    """Measure with re-ranking too."""
    k1: int = Field(default=20, ge=1)
    """Neighbours of the sets, the image itself not counted."""
    k2: int = Field(default=6, ge=1)
    """Neighbours of the query expansion."""
    lambda_value: float = Field(default=0.3, ge=0, le=1)
    """Weight of the original distance."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.k2 > self.k1 + 1:
            raise ValueError(f"k2={self.k2} must not be above k1 + 1 = {self.k1 + 1}")
        return self


class CandidatesConfig(Section):
    """Shortlists of gallery people: few for a clear query, many for an ambiguous one."""

    k: int = Field(default=0, ge=0)
    """People on a shortlist, on average over the queries; 0: no shortlists."""
    score: ScoreOfIdentity = "max"
    """A person scores the highest similarity of its images, or the mean."""
    temperature: float = Field(default=0.05, gt=0)
    """Of the softmax over people."""


class FewShotConfig(Section):
    """Few-shot identification (arXiv:1911.06045) on the query and gallery people."""

    episodes: int = Field(default=0, ge=0)
    """Episodes, 10,000 in the literature; 0: none."""
    way: int = Field(default=5, ge=2)
    """People of an episode."""
    shots: tuple[Annotated[int, Field(ge=1)], ...] = (1, 5)
    """Known images of each; every number is measured."""
    num_queries: int = Field(default=5, ge=1)
    """Images of each to identify."""
    cross_camera: bool = True
    """They are of other cameras than the known ones."""


class CrossConfig(Section):
    """Several checkpoints on several data sets, as a matrix."""

    checkpoints: tuple[UserPath, ...] = ()
    """Rows of the matrix; empty: checkpoint."""
    data: tuple[Source, ...] = ()
    """Columns; empty: data."""


class EvaluateConfig(FeatureConfig):
    """Everything an evaluation is made of."""

    output: UserPath = Path("outputs/evaluate")
    """Folder for metrics.json."""
    data: Source = SyntheticSource()
    """Labelled rows with a query and a gallery split."""
    retrieval: RetrievalConfig = RetrievalConfig()
    false_accept_rates: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.001, 0.01)
    """Shares of wrong pairs at which the share of right pairs that a threshold accepts is told."""
    expansion: ExpansionConfig = ExpansionConfig()
    rerank: RerankConfig = RerankConfig()
    candidates: CandidatesConfig = CandidatesConfig()
    few_shot: FewShotConfig = FewShotConfig()
    cross: CrossConfig = CrossConfig()
