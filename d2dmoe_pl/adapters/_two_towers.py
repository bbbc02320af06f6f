"""A tower for pictures, alone with a head for classes or beside one for texts."""

from collections.abc import Mapping
from typing import Any, ClassVar

from d2dmoe_pl.adapters._adapter import MASK, NO_MASK
from d2dmoe_pl.adapters._ffn_module import FFNModuleAdapter


class TwoTowersAdapter(FFNModuleAdapter):
    """See :class:`FFNModuleAdapter`. Padding is of the texts alone, which another tower sees than the pictures.

    Attributes:
        text_mask: What a batch calls the mask of the texts; ``NO_MASK`` where what is padding is read.
    """

    text_mask: ClassVar[str] = MASK

    def streams(self, model: Any) -> Mapping[str, str]:
        if not hasattr(model, "text_model"):
            return super().streams(model)
        return {"vision_model": NO_MASK, "text_model": self.text_mask}

    def backbone_config(self, config: Any) -> Any:
        return config.vision_config
