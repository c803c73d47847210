"""What a decode worker is told: flags, or BATON_ variables as their defaults."""

from pydantic import Field, field_validator

from common.kv.handoff import HandoffPolicy
from common.worker.settings import WorkerSettings, checked_addresses


class DecodeConfig(WorkerSettings):
    """A decode worker owns sequences: it has their prompts prefilled and generates their tokens."""

    port: int = Field(7200, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    data_port: int = Field(
        0, ge=0, le=65535, description="port where prefill workers push KV; 0 takes a free one"
    )
    prefill: str = Field(
        "",
        description="prefill workers to meet before being Ready, host:port[,host:port]; "
        "others are met when a request names them",
    )
    remote_prefill_min_tokens: int = Field(
        128, ge=1, description="prompts with fewer uncached tokens are prefilled here"
    )
    remote_prefill_max_tokens_ahead: int | None = Field(
        None,
        ge=0,
        le=2**32 - 1,
        description="prompt tokens under way at a prefill worker over which it is passed over; "
        "unset: four times --max-num-batched-tokens; 0: no limit",
    )
    handoff_lease_s: float = Field(
        60.0, gt=0, le=3600, description="most seconds that one prefill worker gets"
    )
    handoff_stall_s: float = Field(
        10.0, gt=0, le=3600, description="most seconds between two blocks of a handoff"
    )
    handoff_attempts: int = Field(
        3, ge=1, le=16, description="prefill workers that are asked before prefilling here"
    )

    @field_validator("prefill")
    @classmethod
    def _check_prefill(cls, value: str) -> str:
        return checked_addresses(value)

    def handoff_policy(self) -> HandoffPolicy:
        return HandoffPolicy(
            min_tokens=self.remote_prefill_min_tokens,
            max_tokens_ahead=self._max_tokens_ahead(),
            lease_s=self.handoff_lease_s,
            stall_timeout_s=self.handoff_stall_s,
            max_attempts=self.handoff_attempts,
        )

    def _max_tokens_ahead(self) -> int:
        limit = self.remote_prefill_max_tokens_ahead
        # Four steps of waiting: prefill elsewhere then takes two to three times as long as here
        # (benchmarks/disaggregation.py), and spares the streams that run here as much.
        return 4 * self.max_num_batched_tokens if limit is None else limit
