"""Process groups, launch environments and the layers' all-reduce."""

from syncbn.distributed.groups import GroupLike as GroupLike
from syncbn.distributed.groups import resolve_group as resolve_group
from syncbn.distributed.initialization import RankInfo as RankInfo
from syncbn.distributed.initialization import init_process_group as init_process_group
