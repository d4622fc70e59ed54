"""What a calibration would take."""

from deltaguard.reports.records.base import Count, Record


class CalibrationPlan(Record):
    """What a calibration would take, from headers and prompts alone; all bytes but the weights' are about.

    Attributes:
        conversations: safety conversations, those held out among them.
        tokens: of all conversations at most, each answer as long as it may be.
        device: where the model runs.
        by_blocks: whether one decoder block is calibrated after the other.
        limit_bytes: what weights and sums may take before that.
        answering_bytes: of the model while it answers, or of what of it is in memory then where it answers
            block by block, with keys and values then.
        weights_bytes: of what is in memory while it is differentiated: the model, or what is in no block and
            the largest block.
        sums_bytes: of the sums over its layers, or over those of the largest block.
        pass_bytes: of what one batch leaves for its pass backwards.
        predicted_bytes: of the predictions for one batch's answers and their gradients; block by block they
            are taken before there are sums.
        hidden_bytes: block by block, of the hidden states of all conversations; else 0.
        disk_bytes: block by block, of what waits on the disk until the run ends, the store of each block
            among it; else 0.
        store_bytes: of the store, at most; null where it keeps everything.
    """

    conversations: Count
    tokens: Count
    device: str
    by_blocks: bool
    limit_bytes: int
    answering_bytes: int
    weights_bytes: int
    sums_bytes: int
    pass_bytes: int
    predicted_bytes: int = 0
    hidden_bytes: int
    disk_bytes: int
    store_bytes: int | None
