#!/bin/bash
# Odoo's master password is `admin` unless a configuration says otherwise: this one does, before Odoo starts.
set -euo pipefail
umask 077
export ODOO_RC=/tmp/odoo.conf
cat > "$ODOO_RC" <<CONFIGURATION
[options]
admin_passwd = ${ODOO_MASTER_PASSWORD:?}
data_dir = /var/lib/odoo
proxy_mode = False
CONFIGURATION
unset ODOO_MASTER_PASSWORD
exec /entrypoint.sh odoo
