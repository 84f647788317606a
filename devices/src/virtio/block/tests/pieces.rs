//! Long requests: their bounds, and invalidations that wait for them.

use std::fs;
use std::sync::{OnceLock, mpsc};
use std::thread;

use iommu::{
    Fault, FaultReason, Gpa, GuestRam, IommuRegion, Iova, IovaRange, Mapping, Perm, Request,
    StreamSink,
};

use super::*;
use crate::testing::{INDIRECT, TranslateBy, WRITE};
use crate::virtio::block::request::MAX_REQUEST;

const TABLE: u64 = 0x10_0000;
const MIB: u64 = 1 << 20;
/// Bytes of RAM: an indirect table of 2^16 entries needs 1 MiB.
const SIZE: u64 = 4 * MIB;

fn ram() -> Arc<GuestRam> {
    let size = usize::try_from(SIZE).unwrap();
    Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), size)]).unwrap())
}

/// A queue with one read request in an indirect table, over a sparse disk of
/// 512 MiB.
struct Long {
    disk: Disk,
    ring: Ring,
    queue: Queue,
    _file: TempFile,
}

fn long(segments: u16, len: u32) -> Long {
    let file = TempFile::new().unwrap();
    file.as_file().set_len(512 * MIB).unwrap();
    let image = Image::open(file.as_path(), true).unwrap();
    let ring = Ring::new(&ram(), 0x1000, 16);
    ring.write(HEADER, [VIRTIO_BLK_T_IN, 0]);
    ring.write(HEADER + 8, 0_u64);
    ring.write(STATUS, u8::try_from(UNTOUCHED).unwrap());
    ring.describe(TABLE, 0, (HEADER, 16), NEXT, 1);
    for slot in 1..=segments {
        ring.describe(TABLE, slot, (0x2_0000, len), NEXT | WRITE, slot + 1);
    }
    ring.describe(TABLE, segments + 1, (STATUS, 1), WRITE, 0);
    let bytes = (u32::from(segments) + 2) * 16;
    ring.describe(ring.base, 0, (TABLE, bytes), INDIRECT, 0);
    ring.make_available(0);
    Long {
        disk: Disk::new("long", image),
        queue: ring.queue(),
        ring,
        _file: file,
    }
}

impl Long {
    fn identity(&self) -> DmaSpace {
        AddressSpace::identity(REQUESTER, Arc::clone(&self.ring.ram)).dma()
    }

    fn serve(&mut self, dma: &DmaSpace) -> Result<Served, QueueError> {
        let go_on = AtomicBool::new(false);
        self.disk.serve(&mut self.queue, dma, &go_on)
    }

    fn status(&self) -> u32 {
        self.ring.read::<u8>(STATUS).into()
    }
}

/// An IOMMU that maps all of RAM one to one until it unmaps the data, and calls
/// a function at the first access to the data.
struct OneToOne {
    unmapped: AtomicBool,
    on_data: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl OneToOne {
    fn translate(&self, request: &Request) -> Result<Mapping, Fault> {
        let data = request.iova.0 >= 0x2_0000 && request.iova.0 < TABLE;
        if data && self.unmapped.load(Ordering::SeqCst) {
            return Err(Fault {
                stream: request.stream,
                iova: request.iova,
                access: request.access,
                reason: FaultReason::Translation,
            });
        }
        if let (true, Some(call)) = (data, self.on_data.get()) {
            call();
        }
        let (first, len) = if data {
            (0x2_0000, TABLE - 0x2_0000)
        } else {
            (request.iova.0 & !0xfff, 0x1000)
        };
        Ok(Mapping {
            iova: IovaRange::from_len(Iova(first), len).unwrap(),
            gpa: Gpa(first),
            perm: Perm::READ_WRITE,
        })
    }
}

fn translated(ram: &Arc<GuestRam>) -> (Arc<OneToOne>, Arc<IommuRegion>, DmaSpace) {
    let iommu = Arc::new(OneToOne {
        unmapped: AtomicBool::new(false),
        on_data: OnceLock::new(),
    });
    let model = Arc::clone(&iommu);
    let translate = move |request: &Request| model.translate(request);
    let region = IommuRegion::new(Arc::new(TranslateBy(translate)), REQUESTER);
    let dma = AddressSpace::translated(Arc::clone(&region), Arc::clone(ram)).dma();
    (iommu, region, dma)
}

/// Waits until the thread sleeps in the kernel.
fn wait_until_asleep(thread: &std::path::Path) {
    loop {
        let stat = fs::read_to_string(thread.join("stat")).unwrap();
        let (_, state) = stat.rsplit_once(") ").unwrap();
        if state.starts_with('S') {
            return;
        }
        thread::yield_now();
    }
}

#[test]
fn request_of_65530_descriptors_is_refused_and_moves_nothing() {
    let mut long = long(65_528, 64 << 10);
    let dma = long.identity();
    assert!(long.serve(&dma).unwrap_err().0.contains("more descriptors"));
    assert_eq!(long.ring.done(), 0);
    assert_eq!(long.disk.counters().read_bytes.load(Ordering::Relaxed), 0);
}

#[test]
fn request_of_all_that_is_offered_is_carried_out() {
    let mut long = long(SEG_MAX, SIZE_MAX);
    let dma = long.identity();
    assert_eq!(long.serve(&dma), Ok(DONE));
    assert_eq!(long.status(), VIRTIO_BLK_S_OK);
    let read = long.disk.counters().read_bytes.load(Ordering::Relaxed);
    assert_eq!(read, MAX_REQUEST);
    let config = config_space(1, 1);
    assert_eq!(config[8..12], SIZE_MAX.to_le_bytes());
    assert_eq!(config[12..16], u32::from(SEG_MAX).to_le_bytes());
}

#[test]
fn request_of_more_bytes_than_are_offered_fails() {
    let mut long = long(SEG_MAX, SIZE_MAX + 512);
    let dma = long.identity();
    assert_eq!(long.serve(&dma), Ok(DONE));
    assert_eq!(long.status(), VIRTIO_BLK_S_IOERR);
    assert_eq!(long.disk.counters().read_bytes.load(Ordering::Relaxed), 0);
}

#[test]
fn invalidation_waits_for_one_piece_of_a_long_request_and_ends_it() {
    let mut long = long(SEG_MAX, 64 << 10);
    let (iommu, region, dma) = translated(&long.ring.ram);
    let (tell, thread) = mpsc::channel();
    let closing = Arc::new(AtomicBool::new(false));
    let invalidator = {
        let closing = Arc::clone(&closing);
        thread::spawn(move || {
            tell.send(fs::read_link("/proc/thread-self").unwrap())
                .unwrap();
            // Until the other thread is about to wait for the gate.
            while !closing.load(Ordering::SeqCst) {
                std::hint::spin_loop();
            }
            region.invalidate_all();
        })
    };
    let thread = std::path::Path::new("/proc").join(thread.recv().unwrap());
    let model = Arc::downgrade(&iommu);
    let _ = iommu.on_data.set(Box::new(move || {
        // The order of an unmap: the table first, then the gate.
        let model = model.upgrade().unwrap();
        model.unmapped.store(true, Ordering::SeqCst);
        closing.store(true, Ordering::SeqCst);
        wait_until_asleep(&thread);
    }));
    assert_eq!(long.serve(&dma), Ok(DONE));
    invalidator.join().unwrap();
    assert_eq!(long.status(), VIRTIO_BLK_S_IOERR);
}

#[test]
fn stopped_queue_keeps_the_interrupted_request() {
    let mut long = long(SEG_MAX, 64 << 10);
    let (iommu, _region, dma) = translated(&long.ring.ram);
    let leave = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&leave);
    let _ = iommu
        .on_data
        .set(Box::new(move || stop.store(true, Ordering::SeqCst)));
    let served = long.disk.serve(&mut long.queue, &dma, &leave);
    assert_eq!(served, Ok(Served::Nothing));
    assert_eq!((long.queue.next_avail(), long.ring.done()), (0, 0));
    assert_eq!(long.status(), UNTOUCHED);
    assert_eq!(long.serve(&dma), Ok(DONE));
    assert_eq!(long.status(), VIRTIO_BLK_S_OK);
    let counters = long.disk.counters();
    assert_eq!(counters.requests.load(Ordering::Relaxed), 1);
}
