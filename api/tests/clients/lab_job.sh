#!/bin/sh
# Runs in the lab, in the directory that lab.sh has prepared.
set -eu
socket=/tmp/machine.sock
kernel=/guest/vmlinuz-6.12
initrd=/guest/initramfs-tools.cpio
# Work of the guest: a TCP stream over its interface, then a read of its disk, then noise on its
# console until it ends.
run="ip addr add 172.16.0.2/24 dev eth0 && ip link set eth0 up && sleep 1 &&
    iperf3 -c 172.16.0.1 -t 60 -i 2 --forceflush &&
    dd if=/dev/vda bs=1M 2>&1 | tail -c 16; echo stream-and-disk \$?; yes flood"
run=$(echo "$run" | tr -d '\n' | tr -s ' ')
export PATH="$PWD:$PATH"
ctl() { portcullis ctl --api-socket "$socket" "$@"; }

fail() {
    echo "lab job: $1; the console's end:"
    tail -n 12 console.log
    exit 1
}

# Waits for a line on the guest's console.
await() {
    seconds=0
    until grep -q "$1" console.log; do
        seconds=$((seconds + 1))
        [ $seconds -lt 300 ] || fail "no \"$1\" on the console"
        sleep 1
    done
}

ip tuntap add tap0 mode tap vnet_hdr
ip addr add 172.16.0.1/24 dev tap0
ip link set tap0 up
iperf3 -s -1 > iperf3.log &
dd if=/dev/urandom of=disk.img bs=1M count=8 2> /dev/null

portcullis serve --api-socket "$socket" --log-level info > console.log 2> monitor.log &
monitor=$!
until [ -e "$socket" ]; do sleep 0.2; done
ls -l "$socket"

if [ -d python ]; then
    # The loader, by its full name: the lab's own may be older or newer than the libraries.
    python/libraries/ld-linux* --library-path python/libraries python/bin/python3 \
        firecracker_client.py "$socket" "$kernel" "$initrd" "guest.run=\"$run\"" disk.img tap0
else
    ctl PUT /boot-source "{\"kernel_image_path\": \"$kernel\", \"initrd_path\": \"$initrd\",
        \"boot_args\": \"console=ttyS0 guest.run=\\\"$(echo "$run" | sed 's/\\/\\\\/g')\\\"\"}"
    ctl PUT /iommu '{"model": "virtio-iommu"}'
    ctl PUT /drives/rootfs '{"drive_id": "rootfs", "path_on_host": "disk.img"}'
    ctl PUT /network-interfaces/eth0 '{"iface_id": "eth0", "host_dev_name": "tap0"}'
    ctl start
fi
await "portcullis-guest: ready"
ctl info
await "bits/sec"
ctl iommu
ctl iommu map eth0

echo "== held for ten seconds with the stream in flight"
ctl pause
sleep 1
held=$(wc -c < console.log)
sleep 9
[ "$held" = "$(wc -c < console.log)" ] || fail "the guest goes on while it is paused"
ctl info --json
ctl resume

echo "== hostile connections while the stream goes on"
./hostile "$socket" $monitor 1000
await "^stream-and-disk"
grep "sender\|receiver" console.log || fail "the stream has no end"
grep -q "^stream-and-disk 0" console.log || fail "the stream or the disk was lost"
ctl iommu

echo "== hostile connections while the guest floods its console"
await "^flood"
before=$(wc -c < console.log)
./hostile "$socket" $monitor 2000
after=$(wc -c < console.log)
[ "$after" -gt "$before" ] || fail "the guest does not flood"
echo "console: $((after - before)) bytes meanwhile"

ctl metrics | grep -v '^#'
ctl stop
wait $monitor
[ ! -e "$socket" ]
tail -c 100000 console.log > console.end && mv console.end console.log
echo "done: the monitor ended with status 0 and took its socket along"
