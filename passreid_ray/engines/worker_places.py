"""On which nodes the workers of a run are."""


class WorkerPlaces:
    """Gathers the node address of every worker of a group; a restarted group is gathered anew.

    On a local cluster, whose addresses are loopback ones, there is nothing to tell.
    """

    def __init__(self) -> None:
        self._addresses: dict[int, str] = {}
        self._world_size = 0
        self._step: int | None = None

    def new_group(self) -> None:
        """Ray made other workers, none of which has begun: one that died before the others began is not mixed in."""
        self._addresses, self._step = {}, None

    def add(self, rank: int, world_size: int, address: str) -> None:
        """A worker has begun. A rank that is known already, or another number of workers, means a new group."""
        if rank in self._addresses or world_size != self._world_size:
            self._addresses, self._world_size, self._step = {}, world_size, None
        self._addresses[rank] = address

    def start(self, step: int) -> None:
        """The group goes on after ``step``."""
        self._step = step

    @property
    def are_news(self) -> bool:
        """Whether the group has started, is complete and was not told yet."""
        is_complete = len(self._addresses) == self._world_size > 0
        is_local = all(address.startswith("127.") for address in self._addresses.values())
        return self._step is not None and is_complete and not is_local

    def take(self) -> tuple[int, list[str]]:
        """The step after which the group started and the address of each rank, once."""
        assert self._step is not None
        step, self._step = self._step, None
        return step, [self._addresses[rank] for rank in sorted(self._addresses)]
