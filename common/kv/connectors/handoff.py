"""The two ends of a handoff: HandoffReceiver (decode worker) and HandoffSender (prefill worker)."""

from common.kv.connectors.prefill_call import GrpcPrefill, PrefillClient
from common.kv.connectors.receiver import HandoffReceiver
from common.kv.connectors.sender import HandoffSender, SendResult

__all__ = ["GrpcPrefill", "HandoffReceiver", "HandoffSender", "PrefillClient", "SendResult"]
