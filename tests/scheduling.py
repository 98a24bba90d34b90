"""How tests are shared out when pytest runs them in several processes."""

from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

USES_CLUSTER = "cluster: None"
"""How a test or a fixture asks for the session's Ray cluster."""


class OneCluster(LoadScopeScheduling):
    """Files that need the Ray cluster go to one process, one after another; the others file by file to whoever is free.

    Two of them, beside one that a test starts by itself, would take more than 24 GB. Files stay whole, for the sake of
    their fixtures.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if USES_CLUSTER in (self.config.rootpath / Path(file)).read_text(encoding="utf-8") else file
