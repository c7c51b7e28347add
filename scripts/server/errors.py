"""What a client is told when it does not get an answer, in the form of OpenAI's errors."""

from starlette.responses import JSONResponse

from model.messages import UserError

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(UserError):
    """A request that is not answered: what is wrong, where in it, and what to do."""

    def __init__(self, message: str, where: str | None = None, status: int = 400, headers: dict | None = None):
        """where: as messages[2].content[0]; the message goes on behind it. headers: of the reply."""
        super().__init__(f"{where} {message}" if where else message)
        self.where, self.status, self.headers = where, status, headers


def error_object(error: Refused) -> dict:
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"message": str(error), "type": kind, "param": error.where, "code": None}


def error_reply(error: Refused) -> JSONResponse:
    return JSONResponse({"error": error_object(error)}, error.status, error.headers)
