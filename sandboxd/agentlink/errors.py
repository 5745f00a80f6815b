"""What an agent can answer, and how a link can fail."""

from sandboxd.kit.errors import SandboxdError


class AgentRefusedError(SandboxdError):
    """The agent answered with an error code of the protocol's closed list; `agent_code` says which."""

    def __init__(self, agent_code: str, message: str) -> None:
        super().__init__(message)
        self.agent_code = agent_code


class LinkBrokenError(SandboxdError):
    """The connection ended, or the peer broke the protocol, before the answer was complete."""

    status = 502
    code = "link_broken"


class UnknownExecError(LinkBrokenError):
    """The agent has no log of that exec: it never came to it, or is long over."""
