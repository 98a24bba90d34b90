# First process of a host made by hosts.py: gives it a home, a /tmp/ray and a /dev/shm of its own, then serves ssh.
# Environment: HOST name, HOST_FOLDER its files, HOST_HOME its home as the machine sees it, KEEP folders below /root that
# stay visible (one per line: where Python lives), SHM_BYTES, SSHD_CONFIG (empty: no sshd).
set -eu
hostname "$HOST"
mount -t tmpfs -o "size=$SHM_BYTES" tmpfs /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
printf '%s\n' "$KEEP" | while IFS= read -r folder; do
    [ -n "$folder" ] || continue
    mkdir -p "$HOST_HOME${folder#"$HOME"}"
    mount --bind "$folder" "$HOST_HOME${folder#"$HOME"}"
done
mount --rbind "$HOST_HOME" "$HOME"
cd "$HOME"
touch "$HOST_FOLDER/ready"
if [ -n "$SSHD_CONFIG" ]; then
    exec /usr/sbin/sshd -D -e -f "$SSHD_CONFIG"
fi
# A shell that waits buries the children of others, as the first process of a host must.
while :; do sleep 3600 & wait $!; done
