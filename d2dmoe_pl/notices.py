"""What is said once of a run that goes on, to whoever reads standard error or has set up logging."""

import logging

from lightning.pytorch.utilities.rank_zero import rank_zero_only


@rank_zero_only
def notice(message: str) -> None:
    """Say ``message``, on the first process only."""
    logging.getLogger("d2dmoe_pl").warning(message)
