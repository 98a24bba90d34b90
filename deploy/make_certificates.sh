#!/usr/bin/env bash
# Certificates for TLS between the nodes of a Ray cluster.
#
#   deploy/make_certificates.sh FOLDER NAME...
#
# Makes in FOLDER, which only its owner may read:
#   ca.key, ca.crt       the authority; ca.key stays where it was made, no node needs it
#   node.key, node.crt   what every node has, valid for each NAME: addresses or host names of the nodes;
#                        with localhost, 127.0.0.1 and 127.0.0.2, where a job without a cluster starts Ray
# Then, in the environment of every node and of every job:
#   RAY_USE_TLS=1 RAY_TLS_CA_CERT=FOLDER/ca.crt RAY_TLS_SERVER_CERT=FOLDER/node.crt RAY_TLS_SERVER_KEY=FOLDER/node.key
# An authority that is already in FOLDER is kept, so that certificates for more nodes can be made later.
set -euo pipefail

DAYS=365

if [ $# -lt 2 ]; then
    sed -n '2,5p' "$0" >&2
    exit 2
fi
folder=$1
shift
umask 077
mkdir -p "$folder"
chmod 700 "$folder"

# openssl talks when all is well, so what it says is shown only when it fails.
run_openssl() {
    local said
    if ! said=$(openssl "$@" 2>&1); then
        printf '%s\nno certificates for %s: openssl %s failed\n' "$said" "$names" "$1" >&2
        exit 1
    fi
}

names=""
for name in "$@"; do
    if [[ $name =~ ^[0-9.]+$ || $name == *:* ]]; then kind=IP; else kind=DNS; fi
    names="$names${names:+,}$kind:$name"
done

if [ ! -f "$folder/ca.key" ]; then
    run_openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days "$DAYS" \
        -subj "/CN=Ray cluster authority" -addext "basicConstraints=critical,CA:TRUE" \
        -addext "keyUsage=critical,keyCertSign" -keyout "$folder/ca.key" -out "$folder/ca.crt"
fi
run_openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=Ray node" \
    -keyout "$folder/node.key" -out "$folder/node.csr"
# Nodes are servers and clients to each other.
printf 'basicConstraints=CA:FALSE\nkeyUsage=digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\nsubjectAltName=%s\n' \
    "$names" >"$folder/node.ext"
run_openssl x509 -req -in "$folder/node.csr" -CA "$folder/ca.crt" -CAkey "$folder/ca.key" -CAcreateserial \
    -days "$DAYS" -extfile "$folder/node.ext" -out "$folder/node.crt"
rm "$folder/node.csr" "$folder/node.ext"
echo "$folder: certificates for $*, valid for $DAYS days"
