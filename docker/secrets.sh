#!/bin/sh
# Draw every secret of the stack into a folder, one file each: docker/secrets.sh [FOLDER] (docker/secrets). What is there stays.
# The folder is its owner's alone; the files in it can be read by the users that containers run as.
set -eu

folder="${1:-$(dirname "$0")/secrets}"
mkdir -p "${folder}"
chmod 700 "${folder}"
cd "${folder}"
umask 022

random() { od -An -N"${1:-24}" -tx1 /dev/urandom | tr -d ' \n'; }
keep() { [ -s "$1" ] || cat > "$1"; } # standard input into a file that is not there yet

random | keep postgres_password
random | keep valkey_password
random | keep grafana_password
random | keep serving_token
random 32 | keep ray_token
random 64 | keep airflow_jwt_secret
head -c 32 /dev/urandom | base64 | tr '+/' '-_' | keep airflow_fernet_key
printf '{"admin": "%s"}\n' "$(random)" | keep airflow_passwords
random 10 | keep s3_access_key
random | keep s3_secret_key

printf 'requirepass %s\nappendonly yes\nmaxmemory-policy noeviction\ndir /data\n' "$(cat valkey_password)" > valkey_config
cat > s3_config <<END
{"identities": [{"name": "limaml", "credentials": [{"accessKey": "$(cat s3_access_key)", "secretKey": "$(cat s3_secret_key)"}],
  "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}
END
cat > limaml.env <<END
PGPASSWORD=$(cat postgres_password)
VALKEY_PASSWORD=$(cat valkey_password)
AWS_ACCESS_KEY_ID=$(cat s3_access_key)
AWS_SECRET_ACCESS_KEY=$(cat s3_secret_key)
AWS_DEFAULT_REGION=us-east-1
END
