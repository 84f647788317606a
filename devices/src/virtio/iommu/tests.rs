use iommu::{
    Access, AddressSpace, Gpa, GuestRam, Iommu, IommuRegion, Iova, IovaRange, StreamId,
    virtio::VirtioIommuConfig,
};

use virtio_queue::Queue;
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::interrupt::MsiVector;
use crate::pause::PauseRequest;
use crate::queue::Interrupt;
use crate::testing::Vector;

const NIC: StreamId = StreamId(8);
const SIZE: u16 = 16;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const REQUEST: u64 = 0x4000;
const REPLY: u64 = 0x5000;
/// Offset of the event queue's memory from the request queue's.
const EVENTS: u64 = 0x8000;

/// A device with both queues started, and the driver side of them.
struct Driver {
    ram: Arc<GuestRam>,
    device: VirtioIommuDevice,
    model: Arc<VirtioIommu>,
    events: Arc<EventQueue>,
    nic: Arc<IommuRegion>,
    interrupts: [Arc<Vector>; 2],
}

fn driver() -> Driver {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    let ram = Arc::new(ram);
    let config = VirtioIommuConfig {
        input_range: IovaRange::new(Iova(0), Iova((1 << 48) - 1)).unwrap(),
        msi_window: None,
        max_mappings: 1 << 16,
        boot_bypass: false,
    };
    let events = Arc::new(EventQueue::default());
    let sink = Arc::clone(&events) as Arc<dyn FaultSink>;
    let model = Arc::new(VirtioIommu::new(config, Arc::clone(&ram), sink));
    let nic = IommuRegion::new(Arc::clone(&model) as Arc<dyn Iommu>, NIC);
    let mut driver = Driver {
        device: VirtioIommuDevice::new(Arc::clone(&model), Arc::clone(&events)),
        interrupts: [Vector::new(), Vector::new()],
        ram,
        model,
        events,
        nic,
    };
    let features = driver.device.features();
    driver.device.negotiated(features).unwrap();
    for index in [REQUEST_QUEUE, EVENT_QUEUE] {
        driver.start(index, u64::from(index) * EVENTS);
    }
    driver
}

impl Driver {
    fn start(&mut self, index: u16, offset: u64) {
        let mut queue = Queue::new(SIZE).unwrap();
        let low = |address: u64| Some(u32::try_from(address + offset).unwrap());
        queue.set_desc_table_address(low(DESC), Some(0));
        queue.set_avail_ring_address(low(AVAIL), Some(0));
        queue.set_used_ring_address(low(USED), Some(0));
        queue.set_ready(true);
        let vector = Arc::clone(&self.interrupts[usize::from(index)]);
        let started = RunningQueue {
            queue,
            dma: AddressSpace::identity(StreamId(0), Arc::clone(&self.ram)).dma(),
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            interrupt: Interrupt::new(vector as Arc<dyn MsiVector>),
        };
        self.device.start_queue(index, started).unwrap();
    }

    fn write<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.ram.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn read<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }

    /// Adds a chain of buffers as the next entry of the available ring.
    fn post(&self, offset: u64, buffers: &[(u64, u32, bool)]) {
        let index: u16 = self.read(offset + AVAIL + 2);
        for (slot, &(address, len, writable)) in (0_u16..).zip(buffers) {
            let at = offset + DESC + u64::from(slot) * 16;
            let more = usize::from(slot) + 1 < buffers.len();
            self.write(at, address);
            self.write(at + 8, len);
            self.write(at + 12, u16::from(more) | u16::from(writable) << 1);
            self.write(at + 14, slot + 1);
        }
        self.write(offset + AVAIL + 4 + u64::from(index % SIZE) * 2, 0_u16);
        self.write(offset + AVAIL + 2, index.wrapping_add(1));
    }

    fn used(&self, offset: u64) -> u16 {
        self.read(offset + USED + 2)
    }

    /// Sends an ATTACH of the NIC and kicks. Returns the status byte in memory.
    fn attach(&mut self, buffers: &[(u64, u32, bool)]) -> Result<u8, DeviceError> {
        let words = [1_u32, 1, NIC.0, 0, 0];
        for (slot, word) in (0_u64..).zip(words) {
            self.write(REQUEST + slot * 4, word);
        }
        self.write(REPLY, 0xff_u8);
        self.post(0, buffers);
        self.device.kicked(REQUEST_QUEUE)?;
        Ok(self.read(REPLY))
    }
}

#[test]
fn request_is_answered_before_the_kick_returns() {
    let mut driver = driver();
    let status = driver.attach(&[(REQUEST, 20, false), (REPLY, 4, true)]);
    assert_eq!(status.unwrap(), 0);
    assert_eq!(driver.used(0), 1);
    assert_eq!(driver.model.endpoint(NIC).unwrap().domain, Some(1));
    assert_eq!(driver.interrupts[0].signals(), 1);
}

#[test]
fn request_cut_into_bytes_is_a_request() {
    let mut driver = driver();
    let pieces = (0..10).map(|piece| (REQUEST + piece * 2, 2, false));
    let tail = [(REPLY, 1, true), (REPLY + 1, 3, true)];
    let buffers: Vec<_> = pieces.chain(tail).collect();
    assert_eq!(driver.attach(&buffers).unwrap(), 0);
}

/// The length of the last used element.
fn used_len(driver: &Driver) -> u32 {
    let index = driver.used(0).wrapping_sub(1) % SIZE;
    driver.read(USED + 4 + u64::from(index) * 8 + 4)
}

#[test]
fn request_without_room_for_a_tail_is_returned_unwritten() {
    let mut driver = driver();
    let status = driver.attach(&[(REQUEST, 20, false), (REPLY, 3, true)]);
    assert_eq!(status.unwrap(), 0xff);
    assert_eq!((driver.used(0), used_len(&driver)), (1, 0));
    assert_eq!(driver.model.endpoint(NIC).unwrap().domain, None);
    let status = driver.attach(&[(REQUEST, 20, false)]);
    assert_eq!(status.unwrap(), 0xff, "no device-writable part");
    let status = driver.attach(&[(REQUEST, 20, false), (REPLY, 4, true)]);
    assert_eq!(status.unwrap(), 0, "the device works on");
    assert_eq!((driver.used(0), used_len(&driver)), (3, 4));
}

#[test]
fn probe_without_room_for_all_properties_is_invalid() {
    let mut driver = driver();
    driver.write(REQUEST, [u32::from(spec::request::PROBE), NIC.0]);
    driver.write(REPLY, [0xff_u8; 32]);
    driver.post(
        0,
        &[
            (REQUEST, 72, false),
            (REPLY, 10, true),
            (REPLY + 10, 18, true),
        ],
    );
    driver.device.kicked(REQUEST_QUEUE).unwrap();
    assert_eq!((driver.used(0), used_len(&driver)), (1, 28));
    let reply: [u8; 32] = driver.read(REPLY);
    assert_eq!(reply[..24], [0; 24], "no property");
    assert_eq!(reply[24..28], [spec::Status::Inval as u8, 0, 0, 0]);
    assert_eq!(reply[28..], [0xff; 4]);
}

#[test]
fn request_of_an_unknown_type_has_used_length_0() {
    let mut driver = driver();
    driver.write(REQUEST, 99_u32);
    driver.write(REPLY, 0xff_u8);
    driver.post(0, &[(REQUEST, 20, false), (REPLY, 4, true)]);
    driver.device.kicked(REQUEST_QUEUE).unwrap();
    assert_eq!((driver.used(0), used_len(&driver)), (1, 0));
    assert_eq!(driver.read::<u8>(REPLY), 0xff);
}

#[test]
fn request_outside_of_memory_needs_a_reset() {
    let mut driver = driver();
    let outcome = driver.attach(&[(0xffff_f000, 20, false), (REPLY, 4, true)]);
    assert!(matches!(outcome, Err(DeviceError::BadQueue { .. })));
}

#[test]
fn endless_request_is_read_to_its_bound() {
    let mut driver = driver();
    let status = driver.attach(&[(REQUEST, 0xf_0000, false), (REPLY, 4, true)]);
    assert_eq!(status.unwrap(), 0, "what lies behind a request is ignored");
}

#[test]
fn faults_reach_the_driver_while_it_posts_buffers() {
    let driver = driver();
    driver.post(EVENTS, &[(REPLY, 24, true)]);
    for page in [0x7000, 0x8000] {
        let _ = driver.nic.enter().translate(Iova(page), Access::Write);
    }
    assert_eq!(driver.used(EVENTS), 1);
    assert_eq!(driver.read::<u8>(REPLY), spec::fault::REASON_DOMAIN);
    assert_eq!(driver.read::<u64>(REPLY + 16), 0x7000);
    assert_eq!(
        driver.events.counts(),
        (1, 1),
        "the second one had no buffer"
    );
    assert_eq!(driver.interrupts[1].signals(), 1);
}

#[test]
fn fault_report_is_written_across_the_descriptors_of_a_buffer() {
    let driver = driver();
    driver.post(EVENTS, &[(REPLY, 10, true), (REPLY + 10, 14, true)]);
    let _ = driver.nic.enter().translate(Iova(0x7000), Access::Write);
    assert_eq!(driver.read::<u8>(REPLY), spec::fault::REASON_DOMAIN);
    assert_eq!(driver.read::<u64>(REPLY + 16), 0x7000);
    driver.post(EVENTS, &[(REPLY, 23, true)]);
    let _ = driver.nic.enter().translate(Iova(0x8000), Access::Write);
    assert_eq!(driver.read::<u64>(REPLY + 16), 0x7000, "too small a buffer");
    assert_eq!(driver.events.counts(), (1, 1));
}

#[test]
fn bypass_is_a_byte_of_the_configuration() {
    let mut driver = driver();
    let mut config = [0xff; 44];
    driver.device.read_config(0, &mut config);
    assert_eq!(config[..8], (!0xfff_u64).to_le_bytes());
    assert_eq!(config[36..], [0; 8]);
    driver.device.write_config(36, &[1]);
    driver.device.read_config(36, &mut config[..1]);
    assert_eq!(config[0], 1);
    let seen = driver.nic.enter().translate(Iova(0x1234), Access::Read);
    assert_eq!(seen.unwrap().gpa_of(Iova(0x1234)), Some(Gpa(0x1234)));
}

#[test]
fn stopped_queue_reports_its_position() {
    let mut driver = driver();
    driver
        .attach(&[(REQUEST, 20, false), (REPLY, 4, true)])
        .unwrap();
    let position = driver.device.stop_queue(REQUEST_QUEUE).unwrap();
    assert_eq!((position.next_avail, position.next_used), (1, 1));
    assert_eq!(driver.device.stop_queue(REQUEST_QUEUE), None);
}

#[test]
fn requests_in_a_pause_are_answered_after_it() {
    let mut driver = driver();
    let pause = Arc::<PauseRequest>::default();
    driver.device.set_deferral(pause.deferral());
    pause.set();
    let buffers = [(REQUEST, 20, false), (REPLY, 4, true)];
    assert_eq!(driver.attach(&buffers).unwrap(), 0xff, "it was answered");
    assert_eq!(driver.used(0), 0);
    assert_eq!(driver.model.endpoint(NIC).unwrap().domain, None);
    pause.clear();
    driver.device.kicked(REQUEST_QUEUE).unwrap();
    assert_eq!((driver.used(0), driver.read::<u8>(REPLY)), (1, 0));
    assert_eq!(driver.model.endpoint(NIC).unwrap().domain, Some(1));
}
