"""`8080 env`: the variables that other programs read."""

import shlex
from typing import Annotated

import typer
from e80_sdk.config import load_connection
from e80_sdk.errors import E80Error, NotLoggedInError

from e80_cli.exits import OK, exit_code_of
from e80_cli.output import Output
from e80_cli.session import login_of


def env(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Print export lines for the shell: key and server, for us and for OpenAI clients.

    \b
    Examples:
      eval "$(8080 env)"
      8080 env --json | jq -r .OPENAI_BASE_URL
    """
    output = Output(as_json=as_json)
    login = login_of(context)
    try:
        connection = load_connection(api_key=login.api_key, base_url=login.base_url)
        if connection.api_key is None:
            raise NotLoggedInError(connection.missing_key())
    except E80Error as error:
        output.error(error)
        return exit_code_of(error)
    variables = {
        "_8080_API_KEY": connection.api_key,
        "_8080_BASE_URL": connection.base_url,
        "OPENAI_API_KEY": connection.api_key,
        "OPENAI_BASE_URL": f"{connection.base_url}/v1",
    }
    if as_json:
        output.data(variables)
        return OK
    for name, value in variables.items():
        output.line(f"export {name}={shlex.quote(value)}")
    return OK
