//! The host kernel's vhost-net behind a test IOMMU, with a driver in this
//! process: the kernel's handling of messages, without a guest.
//!
//! Needs root, `/dev/vhost-net` and `/dev/net/tun`, and fails without them:
//! `cargo xtask lab` has all three.

use std::io;
use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use devices::interrupt::{MsiMessage, MsiVector};
use devices::queue::{Interrupt, RunningQueue};
use devices::tap::Tap;
use devices::vhost::iotlb::IotlbStats;
use devices::vhost::worker::VhostWorker;
use devices::vhost::{IotlbMonitor, VhostContext};
use devices::virtio::net::{Net, NetConfig};
use devices::virtio::{DeviceCounters, VirtioDevice as _};
use iommu::testing::{PAGE, Pages};
use iommu::{
    Access, AddressSpace, GuestRam, Iommu, IommuRegion, Iova, NotifierEvents, Perm, StreamId,
};
use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_queue::{Queue, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const RAM: usize = 64 << 20;
const SIZE: u16 = 256;
const HEADER: usize = 12;
const WRITE: u16 = 2;
/// First I/O virtual address, far from guest-physical ones.
const OFFSET: u64 = 0x7_0000_0000;
const RX: u64 = 0x1_0000;
const TX: u64 = 0x2_0000;
const BUFFERS: u64 = 0x10_0000;
const GUEST_MAC: [u8; 6] = [0x06, 0, 0, 0, 0, 0x77];
const UNMAP: NotifierEvents = NotifierEvents::UNMAP;

struct Vector(EventFd);

impl MsiVector for Vector {
    fn eventfd(&self) -> &EventFd {
        &self.0
    }

    fn route(&self, _message: Option<MsiMessage>) -> io::Result<()> {
        Ok(())
    }

    fn pending(&self) -> bool {
        false
    }
}

/// The driver side of a queue.
struct Ring {
    at: u64,
    posted: u16,
    taken: u16,
    kick: Arc<EventFd>,
    interrupt: Arc<Vector>,
}

impl Ring {
    fn new(at: u64) -> Self {
        Self {
            at,
            posted: 0,
            taken: 0,
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            interrupt: Arc::new(Vector(EventFd::new(EFD_NONBLOCK).unwrap())),
        }
    }
}

/// A machine of one network device and one driver.
struct Setup {
    ram: Arc<GuestRam>,
    space: AddressSpace,
    /// I/O virtual address minus guest-physical address.
    offset: u64,
    pages: Option<Arc<Pages>>,
    net: Net,
    monitor: IotlbMonitor,
    rx: Ring,
    tx: Ring,
    tap: String,
    host: UdpSocket,
    host_mac: [u8; 6],
}

/// Number of the next test's network.
static NEXT: AtomicU32 = AtomicU32::new(1);

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

/// Creates a tap and sets it up.
fn make_tap(tap: &str) {
    // IPv6 is disabled before it is up: the host would report its multicast
    // groups, a packet before the first one that a test sends.
    ip(&format!("tuntap add {tap} mode tap"));
    let v6 = format!("/proc/sys/net/ipv6/conf/{tap}/disable_ipv6");
    if std::fs::exists(&v6).unwrap() {
        std::fs::write(&v6, "1").unwrap();
    }
    ip(&format!("link set {tap} up"));
}

/// Sets the host's address of a test's network on a tap.
fn address(tap: &str, number: u32) {
    ip(&format!("addr add 10.77.{number}.1/24 dev {tap}"));
    ip(&format!(
        "neigh add 10.77.{number}.2 lladdr 06:00:00:00:00:77 dev {tap} nud permanent"
    ));
}

fn mac_of(tap: &str) -> [u8; 6] {
    let address = std::fs::read_to_string(format!("/sys/class/net/{tap}/address")).unwrap();
    let mut mac = [0; 6];
    for (to, from) in mac.iter_mut().zip(address.trim().split(':')) {
        *to = u8::from_str_radix(from, 16).unwrap();
    }
    mac
}

fn monitor(net: &Net) -> IotlbMonitor {
    match net.counters() {
        DeviceCounters::Vhost { mut iotlbs, .. } => iotlbs.remove(0),
        _ => panic!("a network device has IOTLBs"),
    }
}

impl Setup {
    fn identity() -> Self {
        Self::new(None, true)
    }

    fn translated(delivers: NotifierEvents) -> Self {
        Self::with_prefetch(delivers, true)
    }

    fn with_prefetch(delivers: NotifierEvents, prefetch: bool) -> Self {
        Self::new(Some(Pages::new(delivers)), prefetch)
    }

    fn new(pages: Option<Arc<Pages>>, prefetch: bool) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let tap = format!("vtest{number}");
        let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).unwrap());
        let stream = StreamId(8);
        let space = match &pages {
            Some(pages) => {
                let model = Arc::clone(pages) as Arc<dyn Iommu>;
                AddressSpace::translated(IommuRegion::new(model, stream), Arc::clone(&ram))
            }
            None => AddressSpace::identity(stream, Arc::clone(&ram)),
        };
        let context = VhostContext {
            ram: Arc::clone(&ram),
            worker: Arc::new(VhostWorker::start().unwrap()),
            prefill: true,
            prefetch,
            vcpus: 1,
        };
        let config = NetConfig {
            id: "test".into(),
            mac: GUEST_MAC,
            mtu: None,
            pairs: 1,
        };
        make_tap(&tap);
        let made = Tap::open(&tap, 1, None).unwrap();
        let net = Net::new(config, made, &context).expect("vhost-net is available");
        address(&tap, number);
        let host = UdpSocket::bind((format!("10.77.{number}.1"), 7777)).unwrap();
        host.connect((format!("10.77.{number}.2"), 7777)).unwrap();
        host.set_nonblocking(true).unwrap();
        let host_mac = mac_of(&tap);
        Self {
            ram,
            space,
            offset: if pages.is_some() { OFFSET } else { 0 },
            pages,
            monitor: monitor(&net),
            net,
            rx: Ring::new(RX),
            tx: Ring::new(TX),
            tap,
            host,
            host_mac,
        }
    }

    fn pages(&self) -> &Pages {
        self.pages.as_ref().unwrap()
    }

    fn map(&self, gpa: u64, perm: Perm) {
        self.pages().map(gpa + OFFSET, gpa, perm);
    }

    fn unmap(&self, gpa: u64) {
        self.pages().unmap(&[gpa + OFFSET]);
    }

    fn stats(&self) -> IotlbStats {
        self.monitor.stats()
    }

    /// Maps only the rings, negotiates and starts both queues.
    fn start(&mut self) {
        let mut features = 1 << VIRTIO_F_VERSION_1;
        if let Some(pages) = &self.pages {
            features |= 1 << VIRTIO_F_ACCESS_PLATFORM;
            for ring in [RX, TX] {
                for (n, perm) in [(0, Perm::READ), (1, Perm::READ), (2, Perm::READ_WRITE)] {
                    let gpa = ring + n * PAGE;
                    pages.map(gpa + OFFSET, gpa, perm);
                }
            }
        }
        self.net.negotiated(features).unwrap();
        let zeros = vec![0; 3 * 4096];
        for (index, at) in [(0, RX), (1, TX)] {
            self.ram.write_slice(&zeros, GuestAddress(at)).unwrap();
            let ring = if index == 0 {
                &mut self.rx
            } else {
                &mut self.tx
            };
            (ring.posted, ring.taken) = (0, 0);
            let mut queue = Queue::new(SIZE).unwrap();
            queue.set_size(SIZE);
            let halves = |gpa: u64| {
                let iova = gpa + self.offset;
                let low = u32::try_from(iova & 0xffff_ffff).unwrap();
                (Some(low), Some(u32::try_from(iova >> 32).unwrap()))
            };
            let (low, high) = halves(at);
            queue.set_desc_table_address(low, high);
            let (low, high) = halves(at + PAGE);
            queue.set_avail_ring_address(low, high);
            let (low, high) = halves(at + 2 * PAGE);
            queue.set_used_ring_address(low, high);
            queue.set_ready(true);
            let vector = Arc::clone(&ring.interrupt) as Arc<dyn MsiVector>;
            let started = RunningQueue {
                queue,
                dma: self.space.dma(),
                kick: Arc::clone(&ring.kick),
                interrupt: Interrupt::new(vector),
            };
            self.net.start_queue(index, started).unwrap();
        }
    }

    fn stop(&mut self) {
        for index in [0, 1] {
            let position = self.net.stop_queue(index).unwrap();
            let ring = if index == 0 { &self.rx } else { &self.tx };
            let used: u16 = self
                .ram
                .read_obj(GuestAddress(ring.at + 2 * PAGE + 2))
                .unwrap();
            assert_eq!(position.next_avail, used, "it finished what it took");
        }
        self.net.reset();
        let stats = self.stats();
        assert_eq!((stats.entries, stats.stalled), (0, 0));
    }

    /// Stops both queues with their available buffers, and clears the rings.
    fn stop_without_a_tap(&mut self) {
        for index in [0, 1] {
            self.net.stop_queue(index).unwrap();
        }
        self.net.reset();
        if let Some(pages) = &self.pages {
            for ring in [RX, TX] {
                for page in 0..3 {
                    pages.unmap(&[ring + page * PAGE + OFFSET]);
                }
            }
        }
    }

    fn post(&mut self, transmit: bool, gpa: u64, len: usize) {
        let offset = self.offset;
        let ring = if transmit { &mut self.tx } else { &mut self.rx };
        let slot = u64::from(ring.posted % SIZE);
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&(gpa + offset).to_le_bytes());
        descriptor[8..12].copy_from_slice(&u32::try_from(len).unwrap().to_le_bytes());
        let flags = if transmit { 0 } else { WRITE };
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        let (ram, at) = (&self.ram, ring.at);
        let put = |bytes: &[u8], at| ram.write_slice(bytes, GuestAddress(at)).unwrap();
        put(&descriptor, at + 16 * slot);
        let head = ring.posted % SIZE;
        put(&head.to_le_bytes(), at + PAGE + 4 + 2 * slot);
        ring.posted = ring.posted.wrapping_add(1);
        std::sync::atomic::fence(Ordering::SeqCst);
        put(&ring.posted.to_le_bytes(), at + PAGE + 2);
    }

    /// Waits until the device has used one more buffer.
    fn used(&mut self, transmit: bool) -> bool {
        let ring = if transmit { &mut self.tx } else { &mut self.rx };
        let index = GuestAddress(ring.at + 2 * PAGE + 2);
        let taken = ring.taken;
        let ram = &self.ram;
        let done = eventually(|| ram.read_obj::<u16>(index).unwrap() != taken);
        if done {
            ring.taken = ring.taken.wrapping_add(1);
        }
        done
    }

    /// Sends a packet of the driver from a buffer in page `gpa`.
    fn transmit(&mut self, gpa: u64, payload: &[u8]) {
        let frame = self.frame(payload);
        self.ram.write_slice(&frame, GuestAddress(gpa)).unwrap();
        self.post(true, gpa, frame.len());
        self.tx.kick.write(1).unwrap();
    }

    fn frame(&self, payload: &[u8]) -> Vec<u8> {
        let network: u8 = self.tap.trim_start_matches("vtest").parse().unwrap();
        let udp_len = u16::try_from(8 + payload.len()).unwrap();
        let mut ip = vec![0x45, 0];
        ip.extend((20 + udp_len).to_be_bytes());
        ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
        ip.extend([10, 77, network, 2, 10, 77, network, 1]);
        let sum: u32 = (ip.chunks(2))
            .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
            .sum();
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let mut frame = vec![0; HEADER];
        frame.extend(self.host_mac);
        frame.extend(GUEST_MAC);
        frame.extend([8, 0]);
        frame.extend(ip);
        frame.extend(7777_u16.to_be_bytes());
        frame.extend(7777_u16.to_be_bytes());
        frame.extend(udp_len.to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(payload);
        frame
    }

    /// The next packet of the host's socket; `None` after a timeout.
    fn host_gets(&self) -> Option<Vec<u8>> {
        let mut bytes = [0; 2048];
        let mut len = None;
        eventually(|| {
            len = self.host.recv(&mut bytes).ok();
            len.is_some()
        });
        len.map(|len| bytes[..len].to_vec())
    }

    fn host_sends(&self, payload: &[u8]) {
        self.host.send(payload).unwrap();
    }

    /// Waits until a packet with this payload is in the buffer at `gpa`.
    fn arrives(&mut self, gpa: u64, payload: &[u8]) -> bool {
        if !self.used(false) {
            println!("nothing came");
            return false;
        }
        let good = self.read(gpa, 42 + HEADER, payload.len()) == payload;
        if !good {
            println!("came instead: {:x?}", self.read(gpa, HEADER, 128));
        }
        good
    }

    fn read(&self, gpa: u64, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let at = GuestAddress(gpa + u64::try_from(offset).unwrap());
        self.ram.read_slice(&mut bytes, at).unwrap();
        bytes
    }

    /// Waits until a queue waits for a mapping at one address, and leaves the
    /// device time for a forbidden access.
    fn stalls(&self) {
        let stalled = eventually(|| self.stats().stalled == 1);
        assert!(stalled, "{:?}", self.stats());
        sleep(Duration::from_millis(100));
        assert_eq!(self.stats().stalled, 1);
    }

    /// Checks that only the buffer at `gpa` faulted, at least `least` times:
    /// the kernel misses it again whenever it runs the queue, not only after a
    /// kick.
    fn faulted_only_at(&self, gpa: u64, access: Access, least: u64) {
        let at = (Iova(gpa + self.offset), access);
        let faults = self.pages().state().faults.clone();
        assert!(faults.iter().all(|fault| *fault == at), "{faults:x?}");
        assert!(faults.len() as u64 >= least, "{faults:x?}");
        assert!(self.stats().faults >= least, "{:?}", self.stats());
    }

    fn offer(&mut self, gpa: u64) {
        self.post(false, gpa, 2048);
        self.rx.kick.write(1).unwrap();
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["link", "delete", &self.tap])
            .status();
    }
}

fn eventually(mut happens: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        if happens() {
            return true;
        }
        sleep(Duration::from_millis(2));
    }
    happens()
}

fn map_unmap() -> NotifierEvents {
    NotifierEvents::MAP | UNMAP
}

fn buffer(n: u64) -> u64 {
    BUFFERS + n * PAGE
}

#[test]
fn packets_go_both_ways_without_an_iommu() {
    let mut setup = Setup::identity();
    setup.start();
    setup.offer(buffer(1));
    setup.transmit(buffer(0), b"out");
    assert_eq!(setup.host_gets().as_deref(), Some(&b"out"[..]));
    assert!(setup.used(true));
    setup.host_sends(b"and in");
    assert!(setup.arrives(buffer(1), b"and in"));
    assert_eq!(setup.stats().updates, 0);
    assert!(setup.net.take_failure().is_none());
    setup.stop();
}

#[test]
fn misses_are_answered_and_packets_go_both_ways() {
    let mut setup = Setup::translated(UNMAP);
    setup.start();
    assert_eq!(setup.stats().registration, UNMAP);
    for n in 0..64 {
        setup.map(buffer(2 * n), Perm::READ);
        setup.map(buffer(2 * n + 1), Perm::WRITE);
        setup.offer(buffer(2 * n + 1));
        let text = format!("packet {n}");
        setup.transmit(buffer(2 * n), text.as_bytes());
        assert_eq!(setup.host_gets().as_deref(), Some(text.as_bytes()));
        assert!(setup.used(true));
        setup.host_sends(text.as_bytes());
        assert!(setup.arrives(buffer(2 * n + 1), text.as_bytes()), "{n}");
        setup.unmap(buffer(2 * n));
        setup.unmap(buffer(2 * n + 1));
    }
    let stats = setup.stats();
    // Every buffer is missed, because nothing is prefetched. The kernel does
    // not guarantee how often: whenever a queue is run (by a kick or a packet)
    // before its miss is answered, it reports the miss again. A round has two
    // kicks and a packet; twice allows for other wakeups.
    assert!((128..=256).contains(&stats.misses), "{stats:?}");
    assert_eq!(stats.invalidations_sent, 128, "{stats:?}");
    assert_eq!((stats.faults, stats.stalled), (0, 0));
    assert_eq!(stats.entries, 6, "the rings");
    println!("unmap: {stats:?}");
    setup.stop();
}

#[test]
fn prefilled_packets_cost_no_miss() {
    let mut setup = Setup::translated(map_unmap());
    setup.start();
    for n in 0..64 {
        setup.map(buffer(2 * n), Perm::READ);
        setup.map(buffer(2 * n + 1), Perm::WRITE);
        setup.offer(buffer(2 * n + 1));
        setup.transmit(buffer(2 * n), b"prefilled");
        assert!(setup.host_gets().is_some() && setup.used(true));
        setup.host_sends(b"prefilled");
        assert!(setup.arrives(buffer(2 * n + 1), b"prefilled"), "{n}");
        setup.unmap(buffer(2 * n));
        setup.unmap(buffer(2 * n + 1));
    }
    let stats = setup.stats();
    assert_eq!((stats.misses, stats.faults), (0, 0), "{stats:?}");
    println!("map+unmap: {stats:?}");
    setup.stop();
}

/// Receives 200 packets into buffers that are not in the kernel's IOTLB.
fn receive_cold(prefetch: bool) -> IotlbStats {
    let mut setup = Setup::with_prefetch(UNMAP, prefetch);
    setup.start();
    for n in 0..200 {
        setup.map(buffer(n), Perm::WRITE);
        setup.post(false, buffer(n), 2048);
    }
    setup.rx.kick.write(1).unwrap();
    for n in 0..200 {
        let text = format!("{n} of many");
        setup.host_sends(text.as_bytes());
        assert!(setup.arrives(buffer(n), text.as_bytes()), "{n}");
    }
    let stats = setup.stats();
    setup.stop();
    stats
}

#[test]
fn one_miss_prefetches_all_available_buffers() {
    let (with, without) = (receive_cold(true), receive_cold(false));
    println!("prefetch: {with:?}\nno prefetch: {without:?}");
    // One miss, and another whenever the queue is run before its answer.
    assert!((1..20).contains(&with.misses), "{with:?}");
    assert!(with.prefetched >= 199, "{with:?}");
    assert!(without.misses >= 200, "{without:?}");
}

#[test]
fn buffer_that_was_unmapped_is_not_touched() {
    let mut setup = Setup::translated(map_unmap());
    setup.start();
    setup.map(buffer(0), Perm::WRITE);
    setup.offer(buffer(0));
    setup.host_sends(b"first");
    assert!(setup.arrives(buffer(0), b"first"));
    let before = setup.read(buffer(0), 0, 4096);
    setup.offer(buffer(0));
    setup.unmap(buffer(0));
    setup.host_sends(b"second");
    setup.stalls();
    assert_eq!(setup.read(buffer(0), 0, 4096), before);
    setup.faulted_only_at(buffer(0), Access::Write, 1);
    setup.map(buffer(0), Perm::WRITE);
    assert!(setup.arrives(buffer(0), b"second"), "the queue goes on");
    assert_eq!(setup.stats().stalled, 0);
    setup.stop();
}

#[test]
fn packet_in_unmapped_memory_is_not_sent_until_it_is_mapped() {
    let mut setup = Setup::translated(UNMAP);
    setup.start();
    setup.transmit(buffer(0), b"late");
    setup.stalls();
    assert!(setup.host.recv(&mut [0; 64]).is_err());
    setup.faulted_only_at(buffer(0), Access::Read, 1);
    setup.map(buffer(0), Perm::READ);
    setup.tx.kick.write(1).unwrap();
    assert_eq!(setup.host_gets().as_deref(), Some(&b"late"[..]));
    assert_eq!(setup.stats().stalled, 0);
    setup.stop();
}

#[test]
fn read_only_memory_is_not_written() {
    let mut setup = Setup::translated(map_unmap());
    setup.start();
    setup.map(buffer(0), Perm::READ);
    let before = setup.read(buffer(0), 0, 4096);
    setup.offer(buffer(0));
    setup.host_sends(b"forbidden");
    setup.stalls();
    assert_eq!(setup.read(buffer(0), 0, 4096), before);
    assert!(setup.net.take_failure().is_none());
    setup.faulted_only_at(buffer(0), Access::Write, 1);
    setup.unmap(buffer(0));
    setup.map(buffer(0), Perm::WRITE);
    assert!(
        setup.arrives(buffer(0), b"forbidden"),
        "{:?}",
        setup.stats()
    );
    setup.stop();
}

#[test]
fn flush_of_everything_loses_no_packet() {
    let mut setup = Setup::translated(UNMAP);
    setup.start();
    for n in 0..100 {
        let gpa = buffer(n % 8);
        setup.map(gpa, Perm::READ_WRITE);
        setup.offer(gpa);
        setup.pages().region().invalidate_all();
        let text = format!("after flush {n}");
        setup.host_sends(text.as_bytes());
        assert!(
            setup.arrives(gpa, text.as_bytes()),
            "{n}: {:?}",
            setup.stats()
        );
    }
    println!("flushes: {:?}", setup.stats());
    assert_eq!(setup.stats().faults, 0);
    setup.stop();
}

#[test]
fn more_mappings_than_entries_still_let_packets_through() {
    let mut setup = Setup::translated(map_unmap());
    setup.start();
    for n in 0..4000 {
        setup.map(buffer(n), Perm::READ_WRITE);
    }
    for n in 0..4000 {
        let gpa = buffer((n * 1237) % 4000);
        let text = format!("pressure {n}");
        setup.offer(gpa);
        setup.host_sends(text.as_bytes());
        assert!(
            setup.arrives(gpa, text.as_bytes()),
            "{n}: {:?}",
            setup.stats()
        );
    }
    let stats = setup.stats();
    println!("pressure: {stats:?}");
    assert_eq!((stats.faults, stats.entries), (0, 2048));
    setup.stop();
}

#[test]
fn queues_restart_after_a_reset() {
    let mut setup = Setup::translated(map_unmap());
    for n in 0..20 {
        setup.start();
        setup.map(buffer(0), Perm::READ);
        setup.map(buffer(1), Perm::WRITE);
        setup.offer(buffer(1));
        setup.transmit(buffer(0), b"again");
        assert!(setup.host_gets().is_some(), "{n}");
        setup.host_sends(b"again");
        assert!(setup.arrives(buffer(1), b"again"), "{n}");
        // One queue still waits for a buffer that is never mapped.
        setup.transmit(buffer(9), b"never");
        setup.stalls();
        for queue in [0, 1] {
            setup.net.stop_queue(queue).unwrap();
        }
        setup.net.reset();
        assert_eq!((setup.stats().entries, setup.stats().stalled), (0, 0));
        setup.unmap(buffer(0));
        setup.unmap(buffer(1));
        for page in 0..3 {
            setup.unmap(RX + page * PAGE);
            setup.unmap(TX + page * PAGE);
        }
    }
    setup.faulted_only_at(buffer(9), Access::Read, 20);
}

#[test]
fn broken_ring_is_one_failure_and_works_after_a_reset() {
    for translated in [false, true] {
        let mut setup = if translated {
            Setup::translated(UNMAP)
        } else {
            Setup::identity()
        };
        setup.start();
        let bytes = 999_u16.to_le_bytes();
        let index = GuestAddress(TX + PAGE + 2);
        setup.ram.write_slice(&bytes, index).unwrap();
        setup.tx.kick.write(1).unwrap();
        let mut failure = None;
        eventually(|| {
            failure = setup.net.take_failure();
            failure.is_some()
        });
        println!("{}", failure.expect("the device fails"));
        setup.tx.kick.write(1).unwrap();
        sleep(Duration::from_millis(50));
        assert!(setup.net.take_failure().is_none(), "once");
        for queue in [0, 1] {
            setup.net.stop_queue(queue).unwrap();
        }
        setup.net.reset();
        setup.start();
        if translated {
            setup.map(buffer(0), Perm::READ);
        }
        setup.transmit(buffer(0), b"mended");
        assert_eq!(setup.host_gets().as_deref(), Some(&b"mended"[..]));
        setup.stop();
    }
}

impl Setup {
    /// Waits until the device reports the link and a change of configuration.
    #[track_caller]
    fn link_is(&mut self, up: bool) {
        let net = &mut self.net;
        let mut status = [0; 2];
        let shown = eventually(|| {
            net.read_config(6, &mut status);
            status == [u8::from(up), 0]
        });
        assert!(shown, "its status is {status:?}");
        assert!(eventually(|| net.take_config_change()), "it says so");
    }

    /// Sends a packet and receives one.
    #[track_caller]
    fn exchanges(&mut self, payload: &[u8]) {
        self.offer(buffer(1));
        self.transmit(buffer(0), payload);
        assert_eq!(self.host_gets().as_deref(), Some(payload));
        assert!(self.used(true));
        self.host_sends(payload);
        assert!(self.arrives(buffer(1), payload));
    }
}

#[test]
fn link_follows_the_tap_down_and_up() {
    let mut setup = Setup::identity();
    eventually(|| setup.net.take_config_change());
    setup.start();
    setup.exchanges(b"first");
    for _ in 0..3 {
        ip(&format!("link set {} down", setup.tap));
        setup.link_is(false);
        ip(&format!("link set {} up", setup.tap));
        setup.link_is(true);
    }
    let number: u32 = setup.tap.trim_start_matches("vtest").parse().unwrap();
    ip(&format!(
        "neigh replace 10.77.{number}.2 lladdr 06:00:00:00:00:77 dev {} nud permanent",
        setup.tap
    ));
    setup.exchanges(b"again");
    assert!(setup.net.take_failure().is_none());
    setup.stop();
}

#[test]
fn deletion_of_the_tap_ends_the_link_and_nothing_else() {
    for translated in [false, true] {
        let mut setup = if translated {
            Setup::translated(map_unmap())
        } else {
            Setup::identity()
        };
        if translated {
            setup.map(buffer(0), Perm::READ);
            setup.map(buffer(1), Perm::WRITE);
        }
        eventually(|| setup.net.take_config_change());
        setup.start();
        setup.exchanges(b"first");
        ip(&format!("link delete {}", setup.tap));
        setup.link_is(false);
        setup.transmit(buffer(0), b"nowhere");
        // A driver that is unbound from the device and bound again.
        setup.stop_without_a_tap();
        setup.start();
        setup.offer(buffer(1));
        assert!(setup.net.take_failure().is_none());
        make_tap(&setup.tap);
        let number = setup.tap.trim_start_matches("vtest").parse().unwrap();
        address(&setup.tap, number);
        setup.host_mac = mac_of(&setup.tap);
        setup.link_is(true);
        setup.transmit(buffer(0), b"there again");
        assert_eq!(setup.host_gets().as_deref(), Some(&b"there again"[..]));
        setup.host_sends(b"answer");
        assert!(setup.arrives(buffer(1), b"answer"));
        assert!(setup.net.take_failure().is_none());
        setup.stop();
    }
}
