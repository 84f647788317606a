use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use iommu::virtio::{FaultReport, FaultSink, VirtioIommu, VirtioIommuConfig};
use iommu::{AddressSpace, GuestRam, Iommu, IommuRegion, Iova, IovaRange};
use proptest::prelude::*;
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_RNG};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT as _};

use super::*;
use crate::bus::{Bus, BusDevice as _};
use crate::interrupt::{MsiMessage, MsiVector as _};
use crate::pause::PauseRequest;
use crate::pci::{MsiRetranslator, PciRoot};
use crate::queue::QueuePosition;
use crate::testing::{self, Board, NEXT, RAM, REQUESTER, Ring};
use crate::virtio::rng::Rng;

const TABLE: u64 = super::TABLE as u64;
const PENDING: u64 = super::PENDING as u64;
const NOTIFY: u64 = super::NOTIFY as u64;
const DEVICE: u64 = super::DEVICE as u64;

mod access;
mod image;

const BAR: u64 = 0x40_0000_0000;
const SLOT: u64 = 3;
const DOORBELL: u64 = 0xfee0_1000;
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const RING_RESET: u64 = 1 << VIRTIO_F_RING_RESET;
/// Offset of the command register, and its bits.
const COMMAND: u64 = 4;
const MEMORY: u16 = 2;
const MASTER: u16 = 4;

/// Calls that a device of two queues received.
#[derive(Default)]
struct Log {
    running: [Option<Queue>; 2],
    started: Vec<u16>,
    features: Option<u64>,
    failure: Option<DeviceError>,
    config_changed: bool,
    config: [u8; 8],
    config_reads: usize,
}

#[derive(Clone, Default)]
struct RecordingDevice(Arc<Mutex<Log>>);

impl RecordingDevice {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap()
    }
}

impl VirtioDevice for RecordingDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 16]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let start = usize::try_from(offset).unwrap();
        let bytes = {
            let mut log = self.log();
            log.config_reads += 1;
            log.config
        };
        data.iter_mut()
            .zip(bytes.get(start..).unwrap_or_default())
            .for_each(|(to, from)| *to = *from);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let Some(byte) = self.log().config.get_mut(usize::try_from(offset).unwrap()) {
            *byte = data[0];
        }
    }

    fn negotiated(&mut self, features: u64) -> Result<(), DeviceError> {
        self.log().features = Some(features);
        Ok(())
    }

    fn start_queue(&mut self, index: u16, started: RunningQueue) -> Result<(), DeviceError> {
        let mut log = self.log();
        log.started.push(index);
        log.running[usize::from(index)] = Some(started.queue);
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueuePosition> {
        let queue = self.log().running[usize::from(index)].take()?;
        // The position after three requests.
        Some(QueuePosition {
            next_avail: queue.next_avail() + 3,
            next_used: queue.next_used() + 3,
        })
    }

    fn reset(&mut self) {
        self.log().features = None;
    }

    fn take_failure(&mut self) -> Option<DeviceError> {
        self.log().failure.take()
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.log().config_changed)
    }
}

struct NoFaults;

impl FaultSink for NoFaults {
    fn report(&self, _: &FaultReport) {}
}

/// A bus with one function, accessed as a driver does.
struct Driver {
    root: PciRoot,
    memory: Arc<Bus>,
    function: Arc<VirtioPci>,
    board: Arc<Board>,
    ram: Arc<GuestRam>,
}

fn driver_with(
    device: Box<dyn VirtioDevice>,
    ram: Arc<GuestRam>,
    space: AddressSpace,
    ats: Option<AtsHook>,
) -> Driver {
    let board = Arc::new(Board::default());
    let parts = VirtioPciResources {
        requester: Requester::new(space, &MsiRetranslator::new().unwrap()),
        msi: Arc::clone(&board) as Arc<dyn MsiAllocator>,
        doorbells: Arc::clone(&board) as Arc<dyn Doorbells>,
        bar: Gpa(BAR),
        ats,
    };
    let function = VirtioPci::new("test", device, parts).unwrap();
    let memory = Arc::new(Bus::new());
    let root = PciRoot::new(&memory);
    let slot = u8::try_from(SLOT).unwrap();
    root.add(slot, Arc::clone(&function) as Arc<dyn PciFunction>)
        .unwrap();
    Driver {
        root,
        memory,
        function,
        board,
        ram,
    }
}

fn driver_of(device: Box<dyn VirtioDevice>) -> Driver {
    let ram = testing::ram();
    let space = AddressSpace::identity(REQUESTER, Arc::clone(&ram));
    driver_with(device, ram, space, None)
}

/// A driver that has enabled the function of a recording device.
fn recording() -> (Driver, RecordingDevice) {
    let device = RecordingDevice::default();
    let driver = driver_of(Box::new(device.clone()));
    driver.set_config(COMMAND, MEMORY | MASTER);
    (driver, device)
}

impl Driver {
    /// Offset of the capability for access to the BAR (`VIRTIO_PCI_CAP_PCI_CFG`).
    fn window(&self) -> u64 {
        (self.capabilities().into_iter())
            .map(|(_, at)| at)
            .filter(|at| self.config::<1>(*at) == [9])
            .find(|at| self.config::<1>(at + 3) == [5])
            .unwrap()
    }

    fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.root.read((SLOT << 15) + offset, &mut bytes);
        bytes
    }

    fn config16(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.config(offset))
    }

    fn config32(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.config(offset))
    }

    fn set_config(&self, offset: u64, value: u16) {
        self.set_config_bytes(offset, &value.to_le_bytes());
    }

    fn set_config_bytes(&self, offset: u64, bytes: &[u8]) {
        self.root.write((SLOT << 15) + offset, bytes);
    }

    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        assert!(self.memory.read(BAR + offset, &mut bytes));
        bytes
    }

    fn read16(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(offset))
    }

    fn read32(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(offset))
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        assert!(self.memory.write(BAR + offset, bytes));
    }

    fn write16(&self, offset: u64, value: u16) {
        self.write(offset, &value.to_le_bytes());
    }

    fn write32(&self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    fn status(&self) -> u8 {
        self.read::<1>(20)[0]
    }

    fn add_status(&self, bits: u8) {
        self.write(20, &[self.status() | bits]);
    }

    fn offered(&self) -> u64 {
        self.write32(0, 0);
        let low = u64::from(self.read32(4));
        self.write32(0, 1);
        low | u64::from(self.read32(4)) << 32
    }

    /// Negotiates features. Returns whether FEATURES_OK stays set.
    fn negotiate(&self, features: u64) -> bool {
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        for half in [0, 1] {
            self.write32(8, half);
            let bits = features >> (32 * half) & 0xffff_ffff;
            self.write32(12, u32::try_from(bits).unwrap());
        }
        self.add_status(FEATURES_OK);
        self.status() & FEATURES_OK != 0
    }

    /// Sets up a queue and enables it.
    fn enable(&self, index: u16, ring: &Ring) {
        self.write16(22, index);
        self.write16(24, ring.size);
        self.write(32, &ring.base.to_le_bytes());
        self.write(40, &ring.avail().to_le_bytes());
        self.write(48, &ring.used().to_le_bytes());
        self.write16(28, 1);
    }

    fn ring(&self) -> Ring {
        Ring::new(&self.ram, 0x1000, 16)
    }

    /// Negotiates, enables queue 0, and sets DRIVER_OK.
    fn run(&self, features: u64) -> Ring {
        assert!(self.negotiate(features));
        let ring = self.ring();
        self.enable(0, &ring);
        self.add_status(DRIVER_OK);
        ring
    }

    /// Lists the capabilities as (ID, offset).
    fn capabilities(&self) -> Vec<(u8, u64)> {
        let mut found = Vec::new();
        let [mut at] = self.config(0x34);
        while at != 0 {
            let [id, next] = self.config(at.into());
            found.push((id, at.into()));
            assert!(found.len() < 32, "the list has no end");
            at = next;
        }
        found
    }

    fn capability(&self, id: u8) -> u64 {
        let all = self.capabilities();
        all.iter().find(|(known, _)| *known == id).unwrap().1
    }

    /// Enables MSI-X and sets entry `entry` to the doorbell with `data`.
    fn open_entry(&self, entry: u64, data: u32) {
        let at = TABLE + entry * 16;
        self.write(at, &DOORBELL.to_le_bytes());
        self.write32(at + 8, data);
        self.write32(at + 12, 0);
        self.set_config(self.capability(0x11) + 2, 0x8000);
    }
}

fn message(data: u32) -> Option<MsiMessage> {
    Some(MsiMessage {
        address: Gpa(DOORBELL),
        data,
        requester: REQUESTER,
    })
}

#[test]
fn function_identifies_itself() {
    let (driver, _) = recording();
    assert_eq!(driver.config32(0), 0x1042_1af4);
    assert_eq!(driver.config32(8), 0x0180_0001);
    assert_eq!(driver.config16(0x2c), 0x1af4);
    let virtio: Vec<u8> = (driver.capabilities().iter())
        .filter(|(id, _)| *id == 9)
        .map(|(_, at)| driver.config::<1>(at + 3)[0])
        .collect();
    assert_eq!(virtio, [1, 2, 3, 4, 5]);
    let express = driver.capability(0x10);
    assert_eq!(driver.config16(express + 2), 0x92);
    let bar = driver.config32(0x10);
    assert_eq!(bar & 0xf, 0xc, "64-bit, prefetchable memory");
    // The rest of the space exists and has no capability.
    assert_eq!(driver.config32(0x100), 0);
    assert_eq!(driver.config32(0xffc), 0);
}

#[test]
fn structures_do_not_overlap_in_the_bar() {
    let (driver, _) = recording();
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for (_, at) in driver.capabilities().iter().filter(|(id, _)| *id == 9) {
        let [kind, bar] = driver.config(at + 3);
        if kind != 5 {
            assert_eq!(bar, 0);
            ranges.push((driver.config32(at + 8), driver.config32(at + 12)));
        }
    }
    let msix = driver.capability(0x11);
    let entries = u32::from(driver.config16(msix + 2)) + 1;
    assert_eq!(entries, 3, "two queues and the configuration");
    ranges.push((driver.config32(msix + 4), entries * 16));
    ranges.push((driver.config32(msix + 8), entries.div_ceil(64) * 8));
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{ranges:x?}");
    }
    let (start, len) = ranges.last().unwrap();
    assert!(u64::from(start + len) <= BAR_SIZE);
}

#[test]
fn features_are_those_of_the_device_and_the_transport() {
    let (driver, device) = recording();
    let own = device.features();
    assert_eq!(driver.offered(), own | VERSION_1 | RING_RESET);
    driver.write32(0, 2);
    assert_eq!(driver.read32(4), 0);
    for wrong in [0, own, VERSION_1 | 1 << 50] {
        assert!(!driver.negotiate(wrong), "{wrong:#x}");
        assert_eq!(device.log().features, None);
        driver.write(20, &[0]);
    }
    assert!(driver.negotiate(VERSION_1 | 1));
    assert_eq!(device.log().features, Some(VERSION_1 | 1));
    // Features cannot change after FEATURES_OK.
    driver.write32(8, 0);
    driver.write32(12, 0);
    assert_eq!(driver.read32(12), 1);
}

#[test]
fn access_platform_is_offered_behind_an_iommu_and_must_be_taken() {
    let ram = testing::ram();
    let config = VirtioIommuConfig {
        input_range: IovaRange::new(Iova(0), Iova((1 << 48) - 1)).unwrap(),
        msi_window: None,
        max_mappings: 1 << 16,
        boot_bypass: true,
    };
    let model = VirtioIommu::new(config, Arc::clone(&ram), Arc::new(NoFaults));
    let region = IommuRegion::new(Arc::new(model) as Arc<dyn Iommu>, REQUESTER);
    let space = AddressSpace::translated(region, Arc::clone(&ram));
    let driver = driver_with(Box::new(RecordingDevice::default()), ram, space, None);
    driver.set_config(COMMAND, MEMORY | MASTER);
    let platform = 1 << VIRTIO_F_ACCESS_PLATFORM;
    assert_eq!(driver.offered() & platform, platform);
    assert!(!driver.negotiate(VERSION_1));
    driver.write(20, &[0]);
    assert!(driver.negotiate(VERSION_1 | platform));
}

#[test]
fn queue_starts_with_driver_ok_or_after_it() {
    let (driver, device) = recording();
    assert!(driver.negotiate(VERSION_1));
    driver.enable(0, &driver.ring());
    assert!(device.log().started.is_empty());
    driver.add_status(DRIVER_OK);
    assert_eq!(device.log().started, [0]);
    driver.enable(1, &Ring::new(&driver.ram, 0x8000, 8));
    assert_eq!(device.log().started, [0, 1]);
    let log = device.log();
    let queue = log.running[1].as_ref().unwrap();
    assert_eq!((queue.size(), queue.desc_table()), (8, 0x8000));
    assert_eq!((queue.avail_ring(), queue.used_ring()), (0x9000, 0xa000));
    assert!(!queue.event_idx_enabled());
}

#[test]
fn queue_does_not_start_before_features_are_settled() {
    let (driver, device) = recording();
    driver.enable(0, &driver.ring());
    driver.write(20, &[ACKNOWLEDGE | DRIVER | DRIVER_OK]);
    assert!(device.log().started.is_empty());
    // Refused features with DRIVER_OK in the same write.
    driver.write(20, &[0]);
    driver.enable(0, &driver.ring());
    driver.write(20, &[ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK]);
    assert!(device.log().started.is_empty());
    assert_eq!(driver.status() & FEATURES_OK, 0);
}

#[test]
fn invalid_queue_needs_a_reset_and_interrupts() {
    let wrong: [(u16, u64, u64, u64); 6] = [
        (0, 0x1000, 0x2000, 0x3000),
        (3, 0x1000, 0x2000, 0x3000),
        (512, 0x1000, 0x2000, 0x3000),
        (16, 0x1008, 0x2000, 0x3000),
        (16, 0x1000, 0x2001, 0x3000),
        (16, 0x1000, 0x2000, 0x3002),
    ];
    for (size, descriptors, available, used) in wrong {
        let (driver, device) = recording();
        driver.open_entry(2, 7);
        driver.write16(16, 2);
        assert!(driver.negotiate(VERSION_1));
        driver.write16(24, size);
        driver.write(32, &descriptors.to_le_bytes());
        driver.write(40, &available.to_le_bytes());
        driver.write(48, &used.to_le_bytes());
        driver.write16(28, 1);
        let generation = driver.read::<1>(21);
        driver.add_status(DRIVER_OK);
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{size}");
        assert_ne!(driver.read::<1>(21), generation);
        assert_eq!(driver.board.allocated(2).message(), message(7));
        assert_eq!(driver.board.allocated(2).signals(), 1);
        assert!(device.log().started.is_empty());
        // A reset clears NEEDS_RESET.
        driver.write(20, &[0]);
        assert_eq!(driver.status(), 0);
        driver.run(VERSION_1);
        assert_eq!(device.log().started, [0]);
    }
}

#[test]
fn driver_cannot_set_needs_reset() {
    let (driver, _) = recording();
    driver.write(20, &[ACKNOWLEDGE | NEEDS_RESET]);
    assert_eq!(driver.status(), ACKNOWLEDGE);
}

#[test]
fn running_queue_keeps_its_set_up() {
    let (driver, device) = recording();
    driver.run(VERSION_1);
    driver.write16(24, 4);
    driver.write32(32, 0xdead_0000);
    driver.write16(28, 1);
    assert_eq!(driver.read16(24), 16);
    assert_eq!(driver.read32(32), 0x1000);
    assert_eq!(device.log().started, [0]);
}

#[test]
fn addresses_are_written_whole_or_by_halves() {
    let (driver, _) = recording();
    driver.write32(36, 0x11);
    driver.write32(32, 0x2233_4450);
    assert_eq!(u64::from_le_bytes(driver.read(32)), 0x11_2233_4450);
    driver.write(40, &0x55_6677_8890_u64.to_le_bytes());
    assert_eq!(driver.read32(44), 0x55);
    assert_eq!(driver.read::<1>(41), [0x88]);
    // A write of a part of a field is ignored.
    driver.write(32, &[0xff]);
    driver.write16(34, 0xffff);
    assert_eq!(u64::from_le_bytes(driver.read(32)), 0x11_2233_4450);
}

#[test]
fn queue_that_is_not_there_reads_as_zeros() {
    let (driver, _) = recording();
    assert_eq!(driver.read16(18), 2);
    driver.write16(22, 2);
    assert_eq!(driver.read16(24), 0);
    assert_eq!(driver.read16(26), NO_VECTOR);
    for offset in [24, 26, 28, 58] {
        driver.write16(offset, 1);
    }
    driver.write(32, &[0xff; 8]);
    assert_eq!(driver.read::<8>(32), [0; 8]);
}

#[test]
fn queue_reset_stops_and_clears_one_queue() {
    let (driver, device) = recording();
    driver.run(VERSION_1 | RING_RESET);
    driver.enable(1, &Ring::new(&driver.ram, 0x8000, 8));
    driver.write16(22, 0);
    driver.write16(58, 1);
    assert!(device.log().running[0].is_none());
    assert!(device.log().running[1].is_some());
    assert_eq!((driver.read16(58), driver.read16(28)), (0, 0));
    assert_eq!((driver.read16(24), driver.read32(32)), (256, 0));
    driver.enable(0, &Ring::new(&driver.ram, 0x4000, 32));
    let log = device.log();
    let queue = log.running[0].as_ref().unwrap();
    assert_eq!((queue.size(), queue.next_avail()), (32, 0));
}

#[test]
fn queue_reset_needs_its_feature() {
    let (driver, device) = recording();
    driver.run(VERSION_1);
    driver.write16(58, 1);
    assert!(device.log().running[0].is_some());
}

#[test]
fn reset_stops_and_clears_every_queue() {
    let (driver, device) = recording();
    driver.open_entry(1, 5);
    driver.write16(26, 1);
    driver.run(VERSION_1);
    driver.write(20, &[0]);
    assert!(device.log().running.iter().all(Option::is_none));
    assert_eq!(device.log().features, None);
    assert_eq!(driver.status(), 0);
    assert_eq!((driver.read16(24), driver.read16(28)), (256, 0));
    assert_eq!(
        (driver.read16(16), driver.read16(26)),
        (NO_VECTOR, NO_VECTOR)
    );
    assert_eq!(driver.board.allocated(0).message(), None);
}

#[test]
fn queues_stop_without_bus_mastering_and_resume_at_their_position() {
    let (driver, device) = recording();
    driver.open_entry(1, 5);
    driver.write16(26, 1);
    driver.run(VERSION_1);
    driver.set_config(COMMAND, MEMORY);
    assert!(device.log().running[0].is_none());
    driver.board.allocated(0).eventfd().write(1).unwrap();
    assert_eq!(driver.board.allocated(0).message(), None);
    assert_eq!(driver.read::<1>(PENDING), [0b10]);
    driver.set_config(COMMAND, MEMORY | MASTER);
    let log = device.log();
    let queue = log.running[0].as_ref().unwrap();
    assert_eq!((queue.next_avail(), queue.next_used()), (3, 3));
    assert_eq!(driver.board.allocated(0).message(), message(5));
}

#[test]
fn vectors_beyond_the_table_are_refused() {
    let (driver, _) = recording();
    for offset in [16, 26] {
        driver.write16(offset, 2);
        assert_eq!(driver.read16(offset), 2);
        for beyond in [3, 0x8000, NO_VECTOR] {
            driver.write16(offset, beyond);
            assert_eq!(driver.read16(offset), NO_VECTOR);
        }
    }
}

#[test]
fn masked_interrupts_are_pending() {
    let (driver, _) = recording();
    driver.open_entry(0, 5);
    driver.write16(26, 0);
    let vector = driver.board.allocated(0);
    assert_eq!(vector.message(), message(5));
    driver.write32(TABLE + 12, 1);
    assert_eq!(vector.message(), None);
    assert_eq!(driver.read::<8>(PENDING), [0; 8]);
    vector.eventfd().write(1).unwrap();
    assert_eq!(driver.read::<8>(PENDING), [1, 0, 0, 0, 0, 0, 0, 0]);
    // The message that was changed while masked is sent.
    driver.write32(TABLE + 8, 6);
    driver.write32(TABLE + 12, 0);
    assert_eq!(vector.message(), message(6));
    for control in [0, 0xc000] {
        driver.set_config(driver.capability(0x11) + 2, control);
        assert_eq!(vector.message(), None, "{control:#x}");
    }
    driver.set_config(driver.capability(0x11) + 2, 0x8000);
    assert_eq!(vector.message(), message(6));
}

#[test]
fn interrupts_from_before_a_vector_was_set_are_lost() {
    let (driver, _) = recording();
    driver.open_entry(0, 5);
    let vector = driver.board.allocated(0);
    vector.eventfd().write(1).unwrap();
    driver.write16(26, 0);
    assert_eq!(vector.signals(), 0);
    vector.eventfd().write(1).unwrap();
    driver.write16(26, 0);
    assert_eq!(vector.signals(), 1);
}

#[test]
fn several_sources_may_share_an_entry() {
    let (driver, _) = recording();
    driver.open_entry(1, 9);
    driver.write16(16, 1);
    for queue in [0, 1] {
        driver.write16(22, queue);
        driver.write16(26, 1);
    }
    for source in 0..3 {
        assert_eq!(driver.board.allocated(source).message(), message(9));
    }
    // An access that spans two entries writes the second one too.
    driver.write(TABLE + 12, &[1, 0, 0, 0, 4, 3, 2, 1]);
    for source in 0..3 {
        let sent = driver.board.allocated(source).message().unwrap();
        assert_eq!(sent.address, Gpa(0x0102_0304));
    }
}

#[test]
fn bar_is_decoded_at_the_address_that_software_writes() {
    let device = RecordingDevice::default();
    let driver = driver_of(Box::new(device));
    let claimed = |address: u64| driver.memory.read(address, &mut [0; 4]);
    assert!(!claimed(BAR));
    assert!(driver.board.doorbells().is_empty());
    driver.set_config(COMMAND, MEMORY);
    assert!(claimed(BAR) && claimed(BAR + BAR_SIZE - 4) && !claimed(BAR + BAR_SIZE));
    assert_eq!(driver.board.doorbells(), [BAR + NOTIFY, BAR + NOTIFY + 4]);
    // Sizing, then another address, with decoding disabled.
    driver.set_config(COMMAND, 0);
    driver.set_config_bytes(0x10, &[0xff; 8]);
    let size = u64::from_le_bytes(driver.config(0x10)) & !0xf;
    assert_eq!(!size + 1, BAR_SIZE);
    let new = BAR + 0x10_0000;
    driver.set_config_bytes(0x10, &new.to_le_bytes());
    assert!(!claimed(BAR) && !claimed(new) && driver.board.doorbells().is_empty());
    driver.set_config(COMMAND, MEMORY);
    assert!(!claimed(BAR) && claimed(new));
    assert_eq!(driver.board.doorbells(), [new + NOTIFY, new + NOTIFY + 4]);
    // The same with decoding enabled.
    driver.set_config_bytes(0x10, &BAR.to_le_bytes());
    assert!(claimed(BAR) && !claimed(new));
    assert_eq!(driver.board.doorbells(), [BAR + NOTIFY, BAR + NOTIFY + 4]);
}

#[test]
fn bar_at_the_end_of_the_address_space_or_over_another_is_harmless() {
    let (driver, _) = recording();
    driver.set_config_bytes(0x10, &[0xff; 8]);
    let last = u64::MAX - BAR_SIZE + 1;
    assert_eq!(driver.board.doorbells(), [last + NOTIFY, last + NOTIFY + 4]);
    assert!(driver.memory.read(u64::MAX - 3, &mut [0; 4]));
    let other = Arc::new(PciRoot::new(&driver.memory));
    driver.memory.insert(BAR + 0x1000, 0x1000, other).unwrap();
    driver.set_config_bytes(0x10, &BAR.to_le_bytes());
    assert!(driver.board.doorbells().is_empty());
    assert!(!driver.memory.read(BAR, &mut [0; 4]));
    // It can be moved to a free range.
    driver.set_config_bytes(0x10, &(BAR + 0x10_0000).to_le_bytes());
    assert!(driver.memory.read(BAR + 0x10_0000, &mut [0; 4]));
}

#[test]
fn kicks_through_the_bar_reach_the_queue() {
    let (driver, _) = recording();
    driver.write16(NOTIFY + 4, 1);
    driver.write32(NOTIFY + 4, 1);
    driver.write16(NOTIFY + 8, 1);
    assert_eq!(driver.function.kicks[1].read().unwrap(), 2);
    assert!(driver.function.kicks[0].read().is_err());
}

#[test]
fn window_in_configuration_space_is_the_bar() {
    let (driver, _) = recording();
    let at = driver.window();
    let aim = |offset: u64, len: u32| {
        let offset = u32::try_from(offset).unwrap();
        driver.set_config_bytes(at + 8, &offset.to_le_bytes());
        driver.set_config_bytes(at + 12, &len.to_le_bytes());
    };
    aim(20, 1);
    driver.set_config_bytes(at + 16, &[ACKNOWLEDGE]);
    assert_eq!(driver.status(), ACKNOWLEDGE);
    assert_eq!(driver.config::<1>(at + 16), [ACKNOWLEDGE]);
    aim(18, 2);
    assert_eq!(driver.config16(at + 16), 2);
    aim(NOTIFY + 4, 4);
    driver.set_config_bytes(at + 16, &[0; 4]);
    assert_eq!(driver.function.kicks[1].read().unwrap(), 1);
    aim(DEVICE, 4);
    driver.set_config_bytes(at + 16, &[0xab, 0, 0, 0]);
    assert_eq!(driver.read::<1>(DEVICE), [0xab]);
    for (offset, len) in [(BAR_SIZE, 4), (0, 3), (0, 0), (0, u32::MAX)] {
        aim(offset, len);
        driver.set_config_bytes(at + 16, &[0xff; 4]);
        assert_eq!(driver.config32(at + 16), 0, "{offset:#x} {len}");
    }
    // It works while the BAR is not decoded.
    driver.set_config(COMMAND, 0);
    aim(20, 1);
    assert_eq!(driver.config::<1>(at + 16), [ACKNOWLEDGE]);
}

#[test]
fn function_level_reset_is_a_reset_of_all_of_it() {
    let (driver, device) = recording();
    driver.open_entry(1, 5);
    driver.write16(26, 1);
    driver.run(VERSION_1);
    let express = driver.capability(0x10);
    assert_eq!(driver.config32(express + 4) >> 28 & 1, 1, "offered");
    driver.set_config_bytes(0x10, &(BAR + 0x10_0000).to_le_bytes());
    driver.set_config(express + 8, 0x8000);
    assert_eq!(driver.config16(express + 8), 0, "done, and reads as 0");
    assert!(device.log().running[0].is_none());
    assert_eq!(driver.config16(COMMAND), 0);
    assert_eq!(u64::from_le_bytes(driver.config(0x10)) & !0xf, BAR);
    assert_eq!(driver.config16(driver.capability(0x11) + 2) & 0xc000, 0);
    assert!(driver.board.doorbells().is_empty());
    assert_eq!(driver.board.allocated(0).message(), None);
    driver.set_config(COMMAND, MEMORY | MASTER);
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.read32(TABLE + 16 + 12), 1, "masked");
    assert_eq!(driver.read32(TABLE + 16 + 8), 0);
}

#[test]
fn change_of_ats_enable_reaches_the_hook() {
    let on = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&on);
    let hook: AtsHook = Box::new(move |enabled| told.store(enabled, Ordering::Relaxed));
    let ram = testing::ram();
    let space = AddressSpace::identity(REQUESTER, Arc::clone(&ram));
    let driver = driver_with(Box::new(RecordingDevice::default()), ram, space, Some(hook));
    assert_eq!(driver.config32(0x100), 0x0001_000f);
    assert_eq!(driver.config16(0x104), 0x20, "page-aligned requests");
    driver.set_config(0x106, 0x8003);
    assert!(on.load(Ordering::Relaxed));
    assert_eq!(driver.config16(0x106), 0x8003);
    driver.set_config_bytes(0x107, &[0]);
    assert!(!on.load(Ordering::Relaxed));
    driver.set_config(0x106, 0x8000);
    driver.set_config(driver.capability(0x10) + 8, 0x8000);
    assert!(!on.load(Ordering::Relaxed), "a reset switches it off");
}

#[test]
fn failure_of_a_back_end_sets_needs_reset() {
    let (driver, device) = recording();
    driver.open_entry(0, 4);
    driver.write16(16, 0);
    driver.run(VERSION_1);
    device.log().failure = Some(DeviceError::BadQueue {
        queue: 0,
        reason: "of a test",
    });
    driver.function.check();
    assert_eq!(driver.board.allocated(2).signals(), 1);
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    driver.function.check();
    assert_eq!(driver.board.allocated(2).signals(), 0);
}

#[test]
fn change_of_the_device_configuration_is_notified_once() {
    let (driver, device) = recording();
    driver.open_entry(0, 4);
    driver.write16(16, 0);
    driver.run(VERSION_1);
    let generation = || driver.read::<1>(21)[0];
    let before = generation();
    device.log().config_changed = true;
    driver.function.check();
    driver.function.check();
    assert_eq!(driver.board.allocated(2).signals(), 1);
    assert_eq!(generation(), before.wrapping_add(1));
    assert_eq!(driver.status() & NEEDS_RESET, 0);
}

/// A running entropy device.
fn rng() -> (Driver, Ring) {
    let driver = driver_of(Box::new(Rng::new().unwrap()));
    driver.set_config(COMMAND, MEMORY | MASTER);
    driver.open_entry(0, 3);
    assert_eq!(driver.config32(0), 0x1040_1af4 + (VIRTIO_ID_RNG << 16));
    let ring = driver.run(VERSION_1);
    driver.write16(26, 0);
    (driver, ring)
}

#[test]
fn kick_in_a_pause_is_served_when_the_machine_resumes() {
    let (driver, ring) = rng();
    let pause = Arc::<PauseRequest>::default();
    driver.function.set_deferral(pause.deferral());
    pause.set();
    ring.post(&[(0x8000, 100, true)]);
    driver.write16(NOTIFY, 0);
    pause.resume_deferred();
    assert_eq!((ring.done(), driver.board.allocated(0).signals()), (0, 0));
    pause.clear();
    pause.resume_deferred();
    assert_eq!((ring.done(), driver.board.allocated(0).signals()), (1, 1));
}

#[test]
fn entropy_fills_buffers_on_the_kick() {
    let (driver, ring) = rng();
    ring.post(&[(0x8000, 100, true), (0x9000, 5000, true)]);
    driver.write16(NOTIFY, 0);
    assert_eq!(ring.done(), 1);
    assert_eq!(ring.used_entry(0), (0, 4096));
    let given: [u8; 32] = ring.read(0x8000);
    assert_ne!(given, [0; 32]);
    let behind: [u8; 32] = ring.read(0x9000 + 3996);
    assert_eq!(behind, [0; 32], "no more than it said");
    assert_eq!(driver.board.allocated(0).signals(), 1);
    // The driver polls.
    ring.write(ring.avail(), 1_u16);
    ring.post(&[(0x8000, 100, true)]);
    driver.write16(NOTIFY, 0);
    assert_eq!((ring.done(), driver.board.allocated(0).signals()), (2, 0));
    assert!(driver.board.doorbells().is_empty(), "its kicks come here");
}

#[test]
fn chain_without_writable_buffers_receives_no_entropy() {
    let (driver, ring) = rng();
    ring.post(&[(0x8000, 100, false)]);
    driver.write16(NOTIFY, 0);
    assert_eq!(ring.used_entry(0), (0, 0));
    assert_eq!(driver.status() & NEEDS_RESET, 0);
}

#[test]
fn malformed_rings_need_a_reset_and_then_work() {
    type Breakage = fn(&Driver, &Ring);
    let broken: [(&str, Breakage); 6] = [
        ("loop", |_, ring| {
            ring.describe(ring.base, 0, (0x8000, 16), NEXT, 0);
            ring.make_available(0);
        }),
        ("head outside", |_, ring| ring.make_available(ring.size)),
        ("index outside", |_, ring| {
            ring.write(ring.avail() + 2, 0x4000_u16);
        }),
        ("buffer outside", |_, ring| {
            ring.post(&[(RAM - 8, 16, true)]);
        }),
        ("buffer wraps", |_, ring| {
            ring.post(&[(u64::MAX - 8, 16, true)]);
        }),
        ("nested indirect", |_, ring| {
            ring.describe(0x8000, 0, (0x9000, 16), NEXT, 1);
            ring.describe(0x8000, 1, (0x8000, 32), testing::INDIRECT, 0);
            ring.describe(ring.base, 0, (0x8000, 32), testing::INDIRECT, 0);
            ring.make_available(0);
        }),
    ];
    for (name, breakage) in broken {
        let (driver, ring) = rng();
        breakage(&driver, &ring);
        driver.write16(NOTIFY, 0);
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{name}");
        assert_eq!(ring.done(), 0, "{name}");
        driver.write16(NOTIFY, 0);
        ring.write(ring.avail(), 0_u32);
        driver.write(20, &[0]);
        driver.run(VERSION_1);
        ring.post(&[(0x8000, 16, true)]);
        driver.write16(NOTIFY, 0);
        assert_eq!(driver.status() & NEEDS_RESET, 0, "{name}");
        assert_eq!(ring.done(), 1, "{name}");
    }
}

#[test]
fn rings_outside_memory_need_a_reset() {
    for base in [RAM, !0xffff, 0x8000_0000_0000_0000] {
        let driver = driver_of(Box::new(Rng::new().unwrap()));
        driver.set_config(COMMAND, MEMORY | MASTER);
        assert!(driver.negotiate(VERSION_1));
        driver.enable(0, &Ring::new(&driver.ram, base, 16));
        driver.add_status(DRIVER_OK);
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{base:#x}");
    }
}

/// An operation of a driver on a function.
#[derive(Clone, Debug)]
enum Op {
    Bar(u64, Vec<u8>),
    Config(u64, Vec<u8>),
    Read(u64, usize),
    Memory(u64, u64),
    Sane,
}

fn op() -> impl Strategy<Value = Op> {
    let bytes = || {
        let len = prop_oneof![Just(1_usize), Just(2), Just(4), Just(8)];
        len.prop_flat_map(|len| proptest::collection::vec(any::<u8>(), len))
    };
    let small = || proptest::collection::vec(0..20_u8, 2);
    prop_oneof![
        (0..64_u64, small()).prop_map(|(at, bytes)| Op::Bar(at, bytes)),
        (0..64_u64, bytes()).prop_map(|(at, bytes)| Op::Bar(at, bytes)),
        (0..BAR_SIZE, bytes()).prop_map(|(at, bytes)| Op::Bar(at, bytes)),
        (NOTIFY..NOTIFY + 8, bytes()).prop_map(|(at, bytes)| Op::Bar(at, bytes)),
        (TABLE..TABLE + 48, bytes()).prop_map(|(at, bytes)| Op::Bar(at, bytes)),
        (0..0x110_u64, bytes()).prop_map(|(at, bytes)| Op::Config(at, bytes)),
        (0..0x9000_u64, 1..9_usize).prop_map(|(at, len)| Op::Read(at, len)),
        (0..0x3100_u64, any::<u64>()).prop_map(|(at, value)| Op::Memory(at, value)),
        Just(Op::Sane),
    ]
}

proptest! {
    #[test]
    fn no_driver_makes_the_function_panic_or_run_without_driver_ok(
        ops in proptest::collection::vec(op(), 1..60),
    ) {
        let driver = driver_of(Box::new(Rng::new().unwrap()));
        for op in ops {
            match op {
                Op::Bar(at, bytes) => driver.function.write_bar(0, at, &bytes),
                Op::Config(at, bytes) => driver.set_config_bytes(at, &bytes),
                Op::Read(at, len) => {
                    driver.function.read_bar(0, at, &mut vec![0; len]);
                    driver.root.read((SLOT << 15) + at, &mut vec![0; len]);
                }
                Op::Memory(at, value) => driver.ring().write(at, value),
                Op::Sane => {
                    driver.set_config(COMMAND, MEMORY | MASTER);
                    driver.set_config_bytes(0x10, &BAR.to_le_bytes());
                    driver.write(20, &[0]);
                    driver.run(VERSION_1);
                    driver.write16(NOTIFY, 0);
                }
            }
            prop_assert_eq!(driver.config32(0), 0x1044_1af4);
            let mut status = [0];
            driver.function.read_bar(0, 20, &mut status);
            let state = driver.function.state.lock();
            let running = state.queues.iter().any(|queue| queue.running);
            prop_assert!(!running || status[0] & DRIVER_OK != 0 && state.bus_master);
        }
    }
}
