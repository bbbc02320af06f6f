"""What adapters of models that take recordings share."""

from typing import Any


class OfRecordings:
    """Comes before the adapter's other classes: there are no token ids in a batch, and no positions to run out of."""

    def vocabulary_size(self, model: Any) -> int | None:
        """None: what a config calls so is for what such a model writes."""
        return None

    def num_positions(self, model: Any) -> int | None:
        """None: recordings are of one length, or of any."""
        return None
