#!/usr/bin/env python3
"""Boots a guest with a client of Firecracker's API that was written for Firecracker.

    firecracker_client.py SOCKET KERNEL INITRD WORDS DISK TAP

WORDS are put at the end of the kernel command line.

Needs firecracker-python (from PyPI). Its calls are its own, the same as for Firecracker; only the
socket is ours, and the IOMMU, which it is told to ask for. Ends with the machine running.
"""

import sys

from firecracker.api import Api, Resource
from firecracker.exceptions import APIError


def refused(call, *words, **fields):
    """The call must fail with a message that has all the words."""
    try:
        call(**fields)
    except APIError as error:
        message = str(error)
        assert all(word in message for word in words), message
        print("refused, as it should be:", message)
    else:
        raise AssertionError(f"{fields} was taken")


def main():
    path, kernel, initrd, words, disk, tap = sys.argv[1:]
    api = Api(path)
    print("version:", api.version.get().json()["firecracker_version"])
    assert api.describe.get().json()["state"] == "Not started"

    api.logger.put(log_path="machine.log", level="Info", show_level=True, show_log_origin=True)
    api.boot.put(
        kernel_image_path=kernel,
        initrd_path=initrd,
        boot_args="console=ttyS0 reboot=k pci=off panic=1 " + words,
    )
    api.machine_config.put(vcpu_count=1, mem_size_mib=512)
    api.drive.put(drive_id="rootfs", path_on_host=disk, is_root_device=False, is_read_only=False)
    api.network.put(iface_id="eth0", host_dev_name=tap, guest_mac="06:00:ac:10:00:02")
    Resource(api, "/iommu").put(model="virtio-iommu")
    refused(api.vsock.put, "uds_path", "AF_VSOCK", guest_cid=3, uds_path="/run/v.sock")
    refused(api.mmds.put, "/mmds is not supported", anything=1)

    api.actions.put(action_type="InstanceStart")
    assert api.describe.get().json()["state"] == "Running"
    refused(api.boot.put, "running", kernel_image_path=kernel)
    api.vm.patch(state="Paused")
    assert api.describe.get().json()["state"] == "Paused"
    api.vm.patch(state="Resumed")
    assert api.vm_config.get().json()["machine-config"]["mem_size_mib"] == 512
    print("the client has started, paused and resumed the machine")


if __name__ == "__main__":
    main()
