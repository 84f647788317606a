use std::io::{Read as _, Seek as _, Write as _};
use std::thread;

use iommu::{AddressSpace, DmaSpace};
use proptest::prelude::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::Queue;
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::host_file::FileError;
use crate::queue::Interrupt;
use crate::testing::{self, NEXT, RAM, REQUESTER, Ring};

mod pieces;

const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x9000;
const DATA: u64 = 0xa000;
const SECTORS: u64 = 16;
/// A request is done, and its driver requires an interrupt.
const DONE: Served = Served::Done { interrupt: true };
/// Value of the status byte before the device writes it.
const UNTOUCHED: u32 = 0x5a;

/// A disk of 16 sectors, each filled with its number, and a partial sector.
fn image() -> TempFile {
    let file = TempFile::new().unwrap();
    for sector in 0..u8::try_from(SECTORS).unwrap() {
        file.as_file().write_all(&[sector; 512]).unwrap();
    }
    file.as_file().write_all(&[0xee; 100]).unwrap();
    file
}

struct Driver {
    file: TempFile,
    disk: Disk,
    ring: Ring,
    queue: Queue,
    dma: DmaSpace,
}

fn driver_of(read_only: bool) -> Driver {
    let file = image();
    let image = Image::open(file.as_path(), read_only).unwrap();
    driver_over(image, file)
}

fn driver_over(image: Image, file: TempFile) -> Driver {
    let ring = Ring::new(&testing::ram(), 0x1000, 16);
    Driver {
        disk: Disk::new("data", image),
        file,
        queue: ring.queue(),
        dma: AddressSpace::identity(REQUESTER, Arc::clone(&ring.ram)).dma(),
        ring,
    }
}

fn driver() -> Driver {
    driver_of(false)
}

impl Driver {
    /// Adds a request with `data`: address, length, device-writable.
    fn post(&self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) {
        self.ring.write(HEADER, u64::from(kind));
        self.ring.write(HEADER + 8, sector);
        self.ring.write(STATUS, u8::try_from(UNTOUCHED).unwrap());
        let mut buffers = vec![(HEADER, 16, false)];
        buffers.extend(data);
        buffers.push((STATUS, 1, true));
        self.ring.post(&buffers);
    }

    fn serve(&mut self) -> Result<Served, QueueError> {
        let go_on = AtomicBool::new(false);
        self.disk.serve(&mut self.queue, &self.dma, &go_on)
    }

    /// Executes a request. Returns its status and the length in the used ring.
    fn ask(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u32, u32) {
        let before = self.ring.done();
        self.post(kind, sector, data);
        assert_eq!(self.serve(), Ok(DONE));
        assert_eq!(self.ring.done(), before.wrapping_add(1));
        let status: u8 = self.ring.read(STATUS);
        (status.into(), self.ring.used_entry(before).1)
    }

    fn status(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> u32 {
        self.ask(kind, sector, data).0
    }

    /// Executes a discard or write-zeroes request of one segment.
    fn clear(&mut self, kind: u32, first: u64, count: u32, flags: u32) -> u32 {
        self.ring.write(DATA, first);
        self.ring.write(DATA + 8, [count, flags]);
        self.status(kind, 0, &[(DATA, 16, false)])
    }

    fn memory(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ring
            .ram
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    fn stored(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut file = self.file.as_file();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }
}

#[test]
fn sectors_are_read_into_scattered_buffers() {
    let mut driver = driver();
    let room = [(DATA, 100, true), (DATA + 0x1000, 924, true)];
    assert_eq!(
        driver.ask(VIRTIO_BLK_T_IN, 3, &room),
        (VIRTIO_BLK_S_OK, 1025)
    );
    assert_eq!(driver.memory(DATA, 100), [3; 100]);
    assert_eq!(driver.memory(DATA + 0x1000, 412), [3; 412]);
    assert_eq!(driver.memory(DATA + 0x1000 + 412, 512), [4; 512]);
    let counters = driver.disk.counters();
    assert_eq!(counters.read_bytes.load(Ordering::Relaxed), 1024);
    assert_eq!(counters.requests.load(Ordering::Relaxed), 1);
}

#[test]
fn written_sectors_are_the_only_change_of_the_image() {
    let mut driver = driver();
    let mut expected = driver.stored();
    driver
        .ring
        .ram
        .write_slice(&[0xab; 1024], GuestAddress(DATA))
        .unwrap();
    let data = [(DATA, 512, false), (DATA + 512, 512, false)];
    assert_eq!(driver.ask(VIRTIO_BLK_T_OUT, 14, &data), (0, 1));
    expected[14 * 512..16 * 512].fill(0xab);
    assert!(driver.stored() == expected);
    assert_eq!(driver.status(VIRTIO_BLK_T_FLUSH, 0, &[]), VIRTIO_BLK_S_OK);
    let written = &driver.disk.counters().written_bytes;
    assert_eq!(written.load(Ordering::Relaxed), 1024);
}

#[test]
fn header_data_and_status_may_be_cut_anywhere() {
    let mut driver = driver();
    driver.post(VIRTIO_BLK_T_OUT, 1, &[]);
    driver.ring.write(DATA, [0xcd_u8; 32]);
    // The second part of the header has data after it; the status has its own
    // descriptor.
    let data = 512 - 16;
    driver
        .ring
        .ram
        .write_slice(&[0xcd; 512], GuestAddress(HEADER + 16))
        .unwrap();
    driver.ring.write(driver.ring.avail() + 2, 0_u16);
    driver.ring.post(&[
        (HEADER, 5, false),
        (HEADER + 5, 11 + data, false),
        (DATA, 16, false),
        (STATUS, 1, true),
        (STATUS + 8, 0, true),
    ]);
    assert_eq!(driver.serve(), Ok(DONE));
    assert_eq!(driver.ring.read::<u8>(STATUS), 0);
    assert_eq!(driver.stored()[512..1024], [0xcd; 512]);
    // Data and status in one buffer.
    driver.post(VIRTIO_BLK_T_IN, 2, &[]);
    driver.ring.write(driver.ring.avail() + 2, 1_u16);
    driver.ring.post(&[(HEADER, 16, false), (DATA, 513, true)]);
    assert_eq!(driver.serve(), Ok(DONE));
    assert_eq!(driver.memory(DATA, 512), [2; 512]);
    assert_eq!(driver.memory(DATA + 512, 1), [0]);
}

#[test]
fn requests_beyond_the_disk_or_of_odd_length_fail() {
    let mut driver = driver();
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512 + 1, 512),
        (0, 511),
        (0, 1),
    ] {
        let before = driver.stored();
        for (kind, writable) in [(VIRTIO_BLK_T_IN, true), (VIRTIO_BLK_T_OUT, false)] {
            let status = driver.status(kind, sector, &[(DATA, len, writable)]);
            assert_eq!(status, VIRTIO_BLK_S_IOERR, "{kind} {sector:#x} {len}");
        }
        assert!(driver.stored() == before);
    }
    let errors = driver.disk.counters().errors.load(Ordering::Relaxed);
    assert_eq!(errors, 12);
}

#[test]
fn read_only_disk_is_not_written() {
    let mut driver = driver_of(true);
    let before = driver.stored();
    let write = driver.status(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, false)]);
    assert_eq!(write, VIRTIO_BLK_S_IOERR);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(driver.clear(kind, 0, 1, 0), VIRTIO_BLK_S_IOERR);
    }
    assert!(driver.stored() == before);
    assert_eq!(
        driver.status(VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]),
        VIRTIO_BLK_S_OK
    );
}

#[test]
fn name_is_padded_with_zeros() {
    let mut driver = driver();
    driver.ring.write(DATA, [0xff_u8; 32]);
    let room = [(DATA, 2, true), (DATA + 2, 18, true)];
    assert_eq!(driver.ask(VIRTIO_BLK_T_GET_ID, 0, &room), (0, 21));
    assert_eq!(driver.memory(DATA, 4), *b"data");
    assert_eq!(driver.memory(DATA + 4, 16), [0; 16]);
    assert_eq!(driver.memory(DATA + 20, 1), [0xff]);
}

#[test]
fn cleared_sectors_read_as_zeros() {
    for (kind, flags) in [
        (VIRTIO_BLK_T_DISCARD, 0),
        (VIRTIO_BLK_T_WRITE_ZEROES, 0),
        (VIRTIO_BLK_T_WRITE_ZEROES, 1),
    ] {
        let mut driver = driver();
        let mut expected = driver.stored();
        assert_eq!(driver.clear(kind, 8, 8, flags), VIRTIO_BLK_S_OK);
        expected[8 * 512..].fill(0);
        expected[16 * 512..].fill(0xee);
        assert!(driver.stored() == expected, "{kind} {flags}");
        assert_eq!(driver.clear(kind, SECTORS, 0, flags), VIRTIO_BLK_S_OK);
    }
}

#[test]
fn segments_that_cannot_be_cleared_are_refused() {
    let mut driver = driver();
    let before = driver.stored();
    let (discard, zero) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    assert_eq!(driver.clear(discard, 0, 8, 1), VIRTIO_BLK_S_UNSUPP);
    assert_eq!(driver.clear(zero, 0, 8, 2), VIRTIO_BLK_S_UNSUPP);
    for kind in [discard, zero] {
        for (first, count) in [(SECTORS - 1, 2), (u64::MAX, 1), (0, u32::MAX)] {
            assert_eq!(driver.clear(kind, first, count, 0), VIRTIO_BLK_S_IOERR);
        }
        for len in [0, 15, 32] {
            let status = driver.status(kind, 0, &[(DATA, len, false)]);
            assert_eq!(status, VIRTIO_BLK_S_IOERR, "{len}");
        }
    }
    assert!(driver.stored() == before);
}

#[test]
fn unknown_request_is_unsupported() {
    let mut driver = driver();
    assert_eq!(driver.status(0x1234, 0, &[]), VIRTIO_BLK_S_UNSUPP);
}

#[test]
fn data_outside_memory_is_an_error_of_the_request() {
    let mut driver = driver();
    let before = driver.stored();
    for at in [RAM - 256, RAM, u64::MAX - 100] {
        let (status, written) = driver.ask(VIRTIO_BLK_T_IN, 0, &[(at, 512, true)]);
        assert_eq!((status, written), (VIRTIO_BLK_S_IOERR, 1), "{at:#x}");
    }
    let status = driver.status(VIRTIO_BLK_T_OUT, 0, &[(u64::MAX, 512, false)]);
    assert_eq!(status, VIRTIO_BLK_S_IOERR);
    assert!(driver.stored() == before);
    // The device continues.
    let status = driver.status(VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]);
    assert_eq!(status, VIRTIO_BLK_S_OK);
}

#[test]
fn request_without_header_or_status_has_no_answer() {
    let mut driver = driver();
    let broken: [&[(u64, u32, bool)]; 5] = [
        &[(HEADER, 16, false)],
        &[(HEADER, 15, false), (STATUS, 1, true)],
        &[(STATUS, 1, true)],
        &[(HEADER, 16, false), (RAM, 1, true)],
        &[(RAM - 8, 16, false), (STATUS, 1, true)],
    ];
    for buffers in broken {
        driver.ring.post(buffers);
        assert!(driver.serve().is_err(), "{buffers:x?}");
    }
    assert_eq!(driver.ring.done(), 0);
}

#[test]
fn image_that_shrank_fails_requests_and_nothing_else() {
    let mut driver = driver();
    driver.file.as_file().set_len(512).unwrap();
    let beyond = driver.status(VIRTIO_BLK_T_IN, 1, &[(DATA, 512, true)]);
    assert_eq!(beyond, VIRTIO_BLK_S_IOERR);
    let within = driver.status(VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]);
    assert_eq!(within, VIRTIO_BLK_S_OK);
}

/// Variable with the image's path, for the process with a file size limit.
const LIMITED: &str = "PORTCULLIS_TEST_LIMITED_IMAGE";

#[test]
fn write_beyond_the_file_size_limit_is_an_error_of_the_request() {
    let Some(path) = std::env::var_os(LIMITED) else {
        let file = image();
        let this =
            "virtio::block::tests::write_beyond_the_file_size_limit_is_an_error_of_the_request";
        // 4 KiB, with SIGXFSZ ignored as in the monitor.
        let limited = std::process::Command::new("bash")
            .args(["-c", "trap '' XFSZ; ulimit -f 4; exec \"$@\"", "bash"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", this])
            .env(LIMITED, file.as_path())
            .output()
            .unwrap();
        let printed = String::from_utf8_lossy(&limited.stdout);
        assert!(limited.status.success(), "{printed}");
        assert!(printed.contains("1 passed"), "{printed}");
        return;
    };
    let image = Image::open(path.as_ref(), false).unwrap();
    let mut driver = driver_over(image, TempFile::new().unwrap());
    let data = [(DATA, 2048, false)];
    let crossing = driver.status(VIRTIO_BLK_T_OUT, 6, &data);
    assert_eq!(crossing, VIRTIO_BLK_S_IOERR);
    assert_eq!(driver.status(VIRTIO_BLK_T_OUT, 4, &data), VIRTIO_BLK_S_OK);
    let zeroed = driver.clear(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 0);
    assert_eq!(zeroed, VIRTIO_BLK_S_OK);
    let read = driver.status(VIRTIO_BLK_T_IN, 8, &[(DATA, 2048, true)]);
    assert_eq!(read, VIRTIO_BLK_S_OK);
    assert_eq!(driver.memory(DATA, 512), [8; 512]);
}

#[test]
fn image_has_one_writer_or_many_readers() {
    let file = image();
    let open = |read_only| Image::open(file.as_path(), read_only);
    let writer = open(false).unwrap();
    assert_eq!(writer.sectors(), SECTORS);
    for read_only in [true, false] {
        assert!(matches!(open(read_only), Err(ImageError::InUse)));
    }
    drop(writer);
    let readers = [open(true).unwrap(), open(true).unwrap()];
    assert!(matches!(open(false), Err(ImageError::InUse)));
    drop(readers);
    open(false).unwrap();
}

#[test]
fn files_that_are_no_image_are_refused() {
    let short = TempFile::new().unwrap();
    short.as_file().set_len(511).unwrap();
    for path in [short.as_path(), std::path::Path::new("/dev/null")] {
        assert!(matches!(
            Image::open(path, true),
            Err(ImageError::NoImage(_))
        ));
    }
    let nowhere = Image::open(std::path::Path::new("/nowhere"), false);
    assert!(matches!(
        nowhere,
        Err(ImageError::File(FileError::Open { .. }))
    ));
}

#[test]
fn fifo_in_the_place_of_an_image_is_refused_without_waiting_for_its_writer() {
    let fifo = testing::fifo();
    for read_only in [true, false] {
        let refused = Image::open(&fifo.0, read_only);
        assert!(matches!(refused, Err(ImageError::NoImage(_))));
        assert!(Image::check(&fifo.0, read_only).is_err());
    }
}

#[test]
fn image_can_be_checked_while_another_machine_has_it() {
    let file = image();
    let _writer = Image::open(file.as_path(), false).unwrap();
    Image::check(file.as_path(), false).unwrap();
    let nowhere = std::path::Path::new("/nowhere");
    assert!(matches!(
        Image::check(nowhere, true),
        Err(ImageError::File(_))
    ));
}

#[test]
fn image_of_another_format_or_of_partial_sectors_is_doubted_once() {
    let doubts = |start: &[u8], len| {
        let file = TempFile::new().unwrap();
        file.as_file().write_all(start).unwrap();
        file.as_file().set_len(len).unwrap();
        Image::open(file.as_path(), true).unwrap().doubts()
    };
    assert_eq!(doubts(b"\x33\xc0 boot sector", 1024), [""; 0]);
    for (start, name) in [
        (&b"QFI\xfb\0\0\0\x03"[..], "a qcow2 image"),
        (b"KDMV\x01", "a VMDK image"),
        (b"# Disk DescriptorFile\nversion=1", "a VMDK image"),
        (b"vhdxfile", "a VHDX image"),
    ] {
        let [doubt] = doubts(start, 1024).try_into().unwrap();
        assert!(
            doubt.contains(name) && doubt.contains("convert it"),
            "{doubt}"
        );
    }
    let [doubt] = doubts(b"", 1025).try_into().unwrap();
    assert!(doubt.contains("no multiple of 512"), "{doubt}");
}

#[test]
fn flush_and_clearing_are_offered_as_configured() {
    let file = image();
    let open = |read_only| Image::open(file.as_path(), read_only).unwrap();
    let config = |flush| BlockConfig {
        id: "data".into(),
        queues: 2,
        flush,
    };
    let bit = |features: u64, bit: u32| features >> bit & 1 == 1;
    let unsafe_writer = offered(&config(false), &open(false));
    assert!(!bit(unsafe_writer, VIRTIO_BLK_F_FLUSH));
    assert!(bit(unsafe_writer, VIRTIO_BLK_F_DISCARD));
    assert!(!bit(unsafe_writer, VIRTIO_BLK_F_RO));
    let reader = offered(&config(true), &open(true));
    assert!(bit(reader, VIRTIO_BLK_F_FLUSH));
    assert!(bit(reader, VIRTIO_BLK_F_RO));
    assert!(!bit(reader, VIRTIO_BLK_F_DISCARD));
    assert!(!bit(reader, VIRTIO_BLK_F_WRITE_ZEROES));
}

/// The device with its thread, and a started queue.
struct Threaded {
    block: Block,
    board: testing::Board,
    interrupt: Arc<testing::Vector>,
    kick: Arc<EventFd>,
    alarms: std::sync::mpsc::Receiver<()>,
    driver: Driver,
}

fn threaded() -> Threaded {
    let driver = driver_of(true);
    let image = Image::open(driver.file.as_path(), true).unwrap();
    let config = BlockConfig {
        id: "data".into(),
        queues: 1,
        flush: true,
    };
    let mut block = Block::new(&config, image).unwrap();
    let (sound, alarms) = std::sync::mpsc::channel();
    block.set_failure_callback(Box::new(move || sound.send(()).unwrap()));
    let board = testing::Board::default();
    crate::interrupt::MsiAllocator::vector(&board).unwrap();
    let mut threaded = Threaded {
        block,
        interrupt: board.allocated(0),
        board,
        kick: Arc::new(testing::eventfd()),
        alarms,
        driver,
    };
    let queue = threaded.driver.ring.queue();
    threaded.start(queue);
    threaded
}

impl Threaded {
    fn start(&mut self, queue: Queue) {
        let started = RunningQueue {
            queue,
            dma: AddressSpace::identity(REQUESTER, Arc::clone(&self.driver.ring.ram)).dma(),
            kick: Arc::clone(&self.kick),
            interrupt: Interrupt::new(self.board.allocated(0)),
        };
        self.block.start_queue(0, started).unwrap();
    }

    /// Kicks, and waits for `used` used entries.
    fn kick_until(&self, used: u16) {
        self.kick.write(1).unwrap();
        while self.driver.ring.done() != used {
            thread::yield_now();
        }
    }
}

#[test]
fn thread_serves_kicks_and_reports_its_position() {
    let mut disk = threaded();
    for round in 1..=20 {
        let sector = u64::from(round) % SECTORS;
        disk.driver
            .post(VIRTIO_BLK_T_IN, sector, &[(DATA, 512, true)]);
        disk.kick_until(round);
        assert_eq!(disk.driver.ring.read::<u8>(STATUS), 0);
        let byte = u8::try_from(sector).unwrap();
        assert_eq!(disk.driver.memory(DATA, 512), [byte; 512]);
    }
    let stopped = disk.block.stop_queue(0).unwrap();
    let expected = QueuePosition {
        next_avail: 20,
        next_used: 20,
    };
    assert_eq!(stopped, expected);
    assert!(disk.interrupt.signals() > 0);
    assert_eq!(disk.block.stop_queue(0), None);
    // A request that is added while it is stopped needs no kick.
    disk.driver.post(VIRTIO_BLK_T_IN, 9, &[(DATA, 512, true)]);
    let mut queue = disk.driver.ring.queue();
    queue.set_next_avail(stopped.next_avail);
    queue.set_next_used(stopped.next_used);
    disk.start(queue);
    while disk.driver.ring.done() != 21 {
        thread::yield_now();
    }
    assert_eq!(disk.driver.memory(DATA, 1), [9]);
}

#[test]
fn broken_ring_is_one_failure_until_a_reset() {
    let mut disk = threaded();
    disk.driver.ring.describe(0x1000, 0, (HEADER, 16), NEXT, 0);
    disk.driver.ring.make_available(0);
    disk.kick.write(1).unwrap();
    disk.alarms.recv().unwrap();
    let failure = disk.block.take_failure().unwrap();
    assert!(matches!(failure, DeviceError::BadQueue { queue: 0, .. }));
    assert!(disk.block.take_failure().is_none());
    disk.block.stop_queue(0);
    disk.block.reset();
    disk.driver.ring.write(disk.driver.ring.avail() + 2, 0_u16);
    disk.driver.post(VIRTIO_BLK_T_IN, 5, &[(DATA, 512, true)]);
    disk.start(disk.driver.ring.queue());
    disk.kick_until(1);
    assert_eq!(disk.driver.memory(DATA, 1), [5]);
    drop(disk.block);
    assert!(disk.alarms.recv().is_err(), "there was another alarm");
}

#[test]
fn available_index_out_of_range_is_a_failure_and_no_loop() {
    let disk = threaded();
    disk.driver
        .ring
        .write(disk.driver.ring.avail() + 2, 0x8000_u16);
    disk.kick.write(1).unwrap();
    disk.alarms.recv().unwrap();
}

proptest! {
    #[test]
    fn requests_of_noise_have_an_answer_or_are_refused(
        kind in prop_oneof![0..16_u32, any::<u32>()],
        sector in prop_oneof![0..20_u64, any::<u64>()],
        segment in any::<[u8; 16]>(),
        buffers in proptest::collection::vec(
            (
                prop_oneof![Just(HEADER), Just(DATA), Just(STATUS), any::<u64>()],
                prop_oneof![0..32_u32, Just(512), Just(4096), any::<u32>()],
                any::<bool>(),
            ),
            1..6,
        ),
    ) {
        let mut driver = driver();
        driver.ring.write(DATA, segment);
        driver.ring.write(HEADER, u64::from(kind));
        driver.ring.write(HEADER + 8, sector);
        driver.ring.post(&buffers);
        let served = driver.serve();
        prop_assert_eq!(driver.ring.done(), u16::from(served.is_ok()));
        if let Err(QueueError(reason)) = served {
            prop_assert!(!reason.is_empty());
        }
        prop_assert_eq!(driver.stored().len(), 16 * 512 + 100);
    }
}
