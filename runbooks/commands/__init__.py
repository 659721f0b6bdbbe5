"""One module a command of the command line; ``runbooks.cli.COMMANDS`` names them."""
