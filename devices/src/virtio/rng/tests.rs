use std::sync::Arc;

use iommu::AddressSpace;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::queue::Interrupt;
use crate::testing::{self, INDIRECT, NEXT, REQUESTER, Ring, WRITE};

const BASE: u64 = 0x1000;
const TABLE: u64 = 0x8000;
const DATA: u64 = 0x2_0000;

/// Starts the device on the ring, and fills the available buffers.
fn start(ring: &Ring) -> Result<(), DeviceError> {
    let board = testing::Board::default();
    crate::interrupt::MsiAllocator::vector(&board).unwrap();
    Rng::new().unwrap().start_queue(
        0,
        RunningQueue {
            queue: ring.queue(),
            dma: AddressSpace::identity(REQUESTER, Arc::clone(&ring.ram)).dma(),
            kick: Arc::new(testing::eventfd()),
            interrupt: Interrupt::new(board.allocated(0)),
        },
    )
}

#[test]
fn each_chain_is_filled_with_other_bytes() {
    let ring = Ring::new(&testing::ram(), BASE, 16);
    ring.post(&[
        (DATA, 20, true),
        (DATA + 0x100, 0, true),
        (DATA + 0x200, 12, true),
    ]);
    ring.make_available(0);
    start(&ring).unwrap();
    assert_eq!((ring.used_entry(0).1, ring.used_entry(1).1), (32, 32));
    let mut bytes = [0; 32];
    let (first, second) = bytes.split_at_mut(20);
    ring.ram.read_slice(first, GuestAddress(DATA)).unwrap();
    ring.ram
        .read_slice(second, GuestAddress(DATA + 0x200))
        .unwrap();
    // A half is all zeros with a probability of at most 2^-96.
    assert!(first.iter().any(|&byte| byte != 0));
    assert!(second.iter().any(|&byte| byte != 0));
    assert_eq!(ring.read::<u8>(DATA + 20), 0);
}

#[test]
fn request_of_gigabytes_receives_one_page() {
    let ring = Ring::new(&testing::ram(), BASE, 16);
    for slot in 0..64 {
        let flags = if slot == 63 { WRITE } else { NEXT | WRITE };
        ring.describe(TABLE, slot, (DATA, 64 << 20), flags, slot + 1);
    }
    // 64 MiB each, one byte less than 4 GiB in all.
    ring.describe(TABLE, 63, (DATA, (64 << 20) - 1), WRITE, 0);
    ring.describe(BASE, 0, (TABLE, 64 * 16), INDIRECT, 0);
    ring.make_available(0);
    start(&ring).unwrap();
    assert_eq!(ring.used_entry(0), (0, 4096));
}

#[test]
fn chain_longer_than_the_queue_is_refused() {
    let ring = Ring::new(&testing::ram(), BASE, 16);
    for slot in 0..65 {
        ring.describe(TABLE, slot, (DATA, 0), NEXT | WRITE, slot + 1);
    }
    ring.describe(TABLE, 64, (DATA, 1), WRITE, 0);
    ring.describe(BASE, 0, (TABLE, 65 * 16), INDIRECT, 0);
    ring.make_available(0);
    let refused = start(&ring).unwrap_err().to_string();
    assert!(refused.contains("more descriptors"), "{refused}");
    assert_eq!(ring.done(), 0);
}

/// Variable that is set in the test's child process, which can open no files.
const WITHOUT_FILES: &str = "PORTCULLIS_TEST_WITHOUT_FILES";

/// `/dev/urandom` cannot be opened in the child process, as in a chroot without
/// `/dev`.
#[test]
fn random_bytes_need_no_file() {
    if std::env::var_os(WITHOUT_FILES).is_some() {
        let open = || std::fs::File::open("/dev/null").ok();
        let files: Vec<_> = std::iter::from_fn(open).collect();
        assert!(!files.is_empty());
        assert!(Rng::new().is_ok());
        return;
    }
    let test = "virtio::rng::tests::random_bytes_need_no_file";
    let child = std::process::Command::new("sh")
        .args(["-c", "ulimit -n 64 && exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test])
        .env(WITHOUT_FILES, "")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{said}");
    assert!(said.contains("1 passed"), "{said}");
}
