#!/bin/sh
# Runs in the lab, in the directory that lab.sh has prepared.
set -eu
socket=/tmp/machine.sock
kernel=/guest/vmlinuz-6.12
initrd=/guest/initramfs.cpio
export PATH="$PWD:$PATH"
ctl() { portcullis ctl --api-socket "$socket" "$@"; }

# Waits for a line on the guest's console.
await() {
    seconds=0
    until grep -q "$1" console.log; do
        seconds=$((seconds + 1))
        [ $seconds -lt 240 ] || { echo "no \"$1\" on the console:"; tail -5 console.log; exit 1; }
        sleep 1
    done
}

portcullis serve --api-socket "$socket" --log-level info > console.log 2> monitor.log &
monitor=$!
until [ -e "$socket" ]; do sleep 0.2; done
ls -l "$socket"

if [ -d python ]; then
    # The loader, by its full name: the lab's own may be older or newer than the libraries.
    python/libraries/ld-linux* --library-path python/libraries \
        python/bin/python3 firecracker_client.py "$socket" "$kernel" "$initrd"
else
    # The last word floods the console for as long as the guest lives.
    ctl PUT /boot-source "{\"kernel_image_path\": \"$kernel\", \"initrd_path\": \"$initrd\",
        \"boot_args\": \"console=ttyS0 guest.run=\\\"yes flood\\\"\"}"
    ctl start
fi
await "portcullis-guest: ready"
ctl info
[ -d python ] || await "^flood"

before=$(wc -c < console.log)
./hostile "$socket" $monitor 2000
echo "console: $(($(wc -c < console.log) - before)) bytes meanwhile"

ctl pause
sleep 1
held=$(wc -c < console.log)
sleep 2
[ "$held" = "$(wc -c < console.log)" ] || { echo "the guest goes on while it is paused"; exit 1; }
ctl info --json
ctl resume
if [ ! -d python ]; then
    sleep 3
    [ "$held" != "$(wc -c < console.log)" ] || { echo "the guest does not go on"; exit 1; }
fi
ctl metrics | grep -v '^#'
ctl stop
wait $monitor
[ ! -e "$socket" ]
tail -c 300000 console.log > console.end && mv console.end console.log
echo "done: the monitor ended with status 0 and took its socket along"
