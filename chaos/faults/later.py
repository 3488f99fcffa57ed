"""Rows of the matrix about what the program does not have yet."""

from chaos.faults import not_built

not_built(
    40, "the key that encrypts keys is gone", "no keys are stored encrypted yet: secrets come from env: and file:"
)
not_built(51, "Odoo webhooks lost while the gateway is away", "nothing sweeps Odoo yet")
not_built(52, "an audit row is changed by a superuser", "the audit is not chained yet")
