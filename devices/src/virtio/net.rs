//! The network device (virtio 1.2 §5.1): vhost-net transfers packets between
//! the guest and a tap in the host's kernel.

pub mod control;
mod link;
mod rings;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use iommu::lock::RankedMutex;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::little_endian::U16;
use zerocopy::{Immutable, IntoBytes};

use self::control::{CONTROL_SIZE, Command};
use self::rings::{Pair, PairsError, Ring, State, ring_total, split};
use super::counters::{DeviceCounters, NetCounters};
use super::device::VirtioDevice;
use crate::bus::read_image;
use crate::failure::{DeviceError, FailureLatch};
use crate::queue::chain::QueueError;
use crate::queue::{QueuePosition, RunningQueue};
use crate::tap::{Link, Offloads, Tap};
use crate::vhost::pairs::{QueuePair, QueuePairs};
use crate::vhost::sys::{Kind, OpenError};
use crate::vhost::worker::EpollClient;
use crate::vhost::{RINGS, Vhost, VhostContext};

/// Entries of a data queue.
const QUEUE_SIZE: u16 = 256;

/// User's configuration of a network device.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// Name of the device, for the log.
    pub id: String,
    /// Ethernet address of the guest.
    pub mac: [u8; 6],
    /// MTU in bytes that the guest is offered (`VIRTIO_NET_F_MTU`).
    pub mtu: Option<u16>,
    /// Number of queue pairs, at least one.
    pub pairs: u16,
}

/// `struct virtio_net_config` (§5.1.4). The only bit of the status is
/// `VIRTIO_NET_S_LINK_UP`, 1.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    mac: [u8; 6],
    status: U16,
    max_virtqueue_pairs: U16,
    mtu: U16,
}

/// The device, with its tap and its vhost files.
pub struct Net {
    config: NetConfig,
    features: u64,
    queue_sizes: Vec<u16>,
    shared: Arc<Shared>,
    context: VhostContext,
}

/// State that the device shares with the worker thread, which serves the
/// control queue and the tap's link.
struct Shared {
    id: String,
    state: RankedMutex<State, 2>,
    counters: Arc<NetCounters>,
    /// The link changed and the driver was not notified.
    link_changed: AtomicBool,
    failure: Arc<FailureLatch>,
    /// Kick eventfd of the control queue, after its first start.
    kick: OnceLock<Arc<EventFd>>,
}

impl Net {
    /// The device on `tap`, which must have as many queues as `config`.
    ///
    /// # Errors
    /// [`OpenError`] of the host's vhost-net.
    pub fn new(config: NetConfig, tap: Tap, context: &VhostContext) -> Result<Self, OpenError> {
        let failure = Arc::new(FailureLatch::default());
        let mut pairs = Vec::new();
        let all = QueuePairs::new(context.vcpus);
        for pair in 0..config.pairs {
            let place = (config.pairs > 1).then(|| QueuePair {
                pairs: Arc::clone(&all),
                index: pair.into(),
            });
            let name = if config.pairs == 1 {
                config.id.clone()
            } else {
                format!("{} pair {pair}", config.id)
            };
            pairs.push(Pair {
                vhost: Vhost::open(Kind::Net, &name, context, place, &failure)?,
                rings: [None, None],
            });
        }
        let served = match pairs.first() {
            Some(pair) => pair.vhost.features(),
            None => Err(io::Error::from(io::ErrorKind::InvalidInput)),
        };
        let served = served.map_err(|source| OpenError::Other {
            kind: Kind::Net,
            source,
        })?;
        let mut queue_sizes = vec![QUEUE_SIZE; RINGS * pairs.len()];
        if pairs.len() > 1 {
            queue_sizes.push(CONTROL_SIZE);
        }
        let features = offered(&config, served, tap.supported());
        let shared = Arc::new(Shared {
            id: config.id.clone(),
            state: RankedMutex::new(State {
                link: Link::Up,
                refused: false,
                tap,
                pairs,
                all,
                active: 1,
                control: None,
                control_number: 0,
            }),
            counters: Arc::default(),
            link_changed: AtomicBool::new(false),
            failure,
            kick: OnceLock::new(),
        });
        let watched = shared.watch_link(&context.worker);
        watched.map_err(|source| OpenError::Other {
            kind: Kind::Net,
            source,
        })?;
        Ok(Self {
            features,
            config,
            queue_sizes,
            shared,
            context: context.clone(),
        })
    }
}

/// Offered features: those of the device, and of the kernel's device and tap.
fn offered(config: &NetConfig, served: u64, tap: Offloads) -> u64 {
    let kernel = 1 << VIRTIO_NET_F_MRG_RXBUF
        | 1 << VIRTIO_RING_F_EVENT_IDX
        | 1 << VIRTIO_RING_F_INDIRECT_DESC;
    let mut features = served & kernel
        | 1 << VIRTIO_NET_F_MAC
        | 1 << VIRTIO_NET_F_STATUS
        | 1 << VIRTIO_NET_F_CSUM
        | 1 << VIRTIO_NET_F_HOST_TSO4
        | 1 << VIRTIO_NET_F_HOST_TSO6
        | 1 << VIRTIO_NET_F_HOST_ECN;
    for (bit, offload) in GUEST_OFFLOADS {
        if tap.contains(offload) {
            features |= 1 << bit;
        }
    }
    if tap.contains(Offloads::UFO) {
        features |= 1 << VIRTIO_NET_F_HOST_UFO;
    }
    if tap.contains(Offloads::USO4 | Offloads::USO6) {
        features |= 1 << VIRTIO_NET_F_HOST_USO;
    }
    if config.mtu.is_some() {
        features |= 1 << VIRTIO_NET_F_MTU;
    }
    if config.pairs > 1 {
        features |= 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
    }
    features
}

/// Feature bits for offloads that the guest accepts, each with the tap's
/// offload.
const GUEST_OFFLOADS: [(u32, Offloads); 7] = [
    (VIRTIO_NET_F_GUEST_CSUM, Offloads::CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, Offloads::TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, Offloads::TSO6),
    (VIRTIO_NET_F_GUEST_ECN, Offloads::ECN),
    (VIRTIO_NET_F_GUEST_UFO, Offloads::UFO),
    (VIRTIO_NET_F_GUEST_USO4, Offloads::USO4),
    (VIRTIO_NET_F_GUEST_USO6, Offloads::USO6),
];

/// Offloads of the tap for the driver's features. The kernel refuses any
/// offload without checksums, and UDP segmentation for only one version of IP.
fn guest_offloads(features: u64) -> Offloads {
    let has = |bit: u32| features >> bit & 1 == 1;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return Offloads::empty();
    }
    let both = has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6);
    let uso = [VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6];
    // ECN is an attribute of TCP segmentation.
    let tcp = has(VIRTIO_NET_F_GUEST_TSO4) || has(VIRTIO_NET_F_GUEST_TSO6);
    GUEST_OFFLOADS
        .into_iter()
        .filter(|(bit, _)| has(*bit))
        .filter(|(bit, _)| both || !uso.contains(bit))
        .filter(|(bit, _)| tcp || *bit != VIRTIO_NET_F_GUEST_ECN)
        .map(|(_, offload)| offload)
        .collect()
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let up = self.shared.counters.link_up.load(Ordering::Relaxed);
        let config = Config {
            mac: self.config.mac,
            status: u16::from(up).into(),
            max_virtqueue_pairs: self.config.pairs.into(),
            mtu: self.config.mtu.unwrap_or(0).into(),
        };
        read_image(config.as_bytes(), offset, data);
    }

    fn negotiated(&mut self, features: u64) -> Result<(), DeviceError> {
        let mut state = self.shared.state.lock();
        let several = features >> VIRTIO_NET_F_MQ & 1 == 1;
        state.control_number = match several {
            true => ring_total(state.pairs.len()),
            false => ring_total(1),
        };
        state.set_active(1);
        state
            .tap
            .set_offloads(guest_offloads(features))
            .map_err(DeviceError::backend("setting the offloads of the tap"))?;
        let mut pairs = state.pairs.iter();
        pairs.try_for_each(|pair| pair.vhost.negotiated(features))
    }

    fn start_queue(&mut self, index: u16, started: RunningQueue) -> Result<(), DeviceError> {
        let kick = Arc::clone(&started.kick);
        let mut state = self.shared.state.lock();
        if self.queue_sizes.len() > RINGS && index == state.control_number {
            state.control = Some((index, started));
            drop(state);
            return self.watch(&kick);
        }
        let (pair, ring) = split(index);
        let known = state.pairs.get_mut(pair);
        let slot = known.and_then(|pair| pair.rings.get_mut(ring));
        let slot = slot.ok_or(QueueError("there is no such queue").of(index))?;
        *slot = Some(Ring {
            started,
            running: false,
        });
        if pair < state.active {
            state.start_ring(pair, ring)?;
        }
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueuePosition> {
        let mut state = self.shared.state.lock();
        let control = state.control.take_if(|(number, _)| *number == index);
        if let Some((_, started)) = control {
            return Some(started.position());
        }
        let (pair, ring) = split(index);
        state.stop_ring(pair, ring);
        let pair = state.pairs.get_mut(pair)?;
        let stopped = pair.rings.get_mut(ring)?.take()?;
        Some(stopped.started.position())
    }

    fn reset(&mut self) {
        let mut state = self.shared.state.lock();
        for pair in 0..state.pairs.len() {
            for ring in 0..RINGS {
                state.stop_ring(pair, ring);
            }
        }
        for pair in &mut state.pairs {
            pair.rings = [None, None];
            pair.vhost.reset();
        }
        state.control = None;
        if let Err(error) = state.use_pairs(1) {
            log::error!("{}: going back to one queue pair: {error}", self.config.id);
        }
        self.shared.failure.clear();
    }

    fn counters(&self) -> DeviceCounters {
        let state = self.shared.state.lock();
        let pairs = state.pairs.iter();
        DeviceCounters::Vhost {
            iotlbs: pairs.map(|pair| pair.vhost.monitor()).collect(),
            net: Some(Arc::clone(&self.shared.counters)),
        }
    }

    fn failure(&self) -> Option<&FailureLatch> {
        Some(&self.shared.failure)
    }

    fn take_config_change(&mut self) -> bool {
        self.shared.link_changed.swap(false, Ordering::AcqRel)
    }
}

impl Net {
    /// Makes the worker thread serve the control queue's kicks.
    fn watch(&self, kick: &Arc<EventFd>) -> Result<(), DeviceError> {
        if self.shared.kick.set(Arc::clone(kick)).is_ok() {
            let served = Arc::downgrade(&self.shared) as Weak<dyn EpollClient>;
            let watched = self.context.worker.serve(served, &[&**kick]);
            watched.map_err(DeviceError::backend("watching the control queue"))?;
        }
        // Commands may have been added, and kicked, before this.
        let _ = kick.write(1);
        Ok(())
    }
}

impl EpollClient for Shared {
    /// Serves the control queue, or a change of a link of the host.
    fn ready(&self, _source: u32) -> bool {
        let kicked = self.kick.get().is_some_and(|kick| kick.read().is_ok());
        if kicked {
            self.serve_control();
        }
        self.follow_link();
        self.failure.notify();
        true
    }
}

impl Shared {
    fn serve_control(&self) {
        let mut state = self.state.lock();
        // The queue is taken out, because a command changes the state.
        let Some((number, mut started)) = state.control.take() else {
            return;
        };
        let (failure, counters) = (&self.failure, &self.counters);
        let served = control::serve(&mut started, &mut |command| {
            let done = match command {
                Command::Pairs(pairs) => match state.use_pairs(usize::from(pairs)) {
                    Ok(()) => true,
                    Err(PairsError::Refused(_)) => false,
                    Err(PairsError::Device(error)) => {
                        failure.record(error);
                        false
                    }
                },
                Command::Unknown => false,
            };
            counters.count_command(done);
            done
        });
        if let Err(error) = served {
            failure.record(error.of(number));
        }
        state.control = Some((number, started));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(pairs: u16, mtu: Option<u16>) -> NetConfig {
        NetConfig {
            id: "net0".into(),
            mac: [6, 0, 1, 2, 3, 4],
            mtu,
            pairs,
        }
    }

    #[test]
    fn features_follow_the_kernel_the_tap_and_the_user() {
        let has = |features: u64, bit: u32| features >> bit & 1 == 1;
        let least = offered(&config(1, None), 0, Offloads::empty());
        for bit in [
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_HOST_UFO,
            VIRTIO_NET_F_HOST_USO,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_MQ,
            VIRTIO_NET_F_CTRL_VQ,
        ] {
            assert!(!has(least, bit), "bit {bit}");
            assert!(
                has(
                    offered(&config(4, Some(9000)), u64::MAX, Offloads::all()),
                    bit
                ),
                "{bit}"
            );
        }
        let kernel_only = offered(&config(1, None), u64::MAX, Offloads::empty());
        assert!(!has(kernel_only, 27), "vhost gives bit 27 another meaning");
    }

    #[test]
    fn tap_gets_only_offloads_that_the_kernel_takes_together() {
        let bits = |bits: &[u32]| bits.iter().fold(0_u64, |all, bit| all | 1 << bit);
        assert_eq!(
            guest_offloads(bits(&[VIRTIO_NET_F_GUEST_TSO4])),
            Offloads::empty()
        );
        let csum = VIRTIO_NET_F_GUEST_CSUM;
        assert_eq!(
            guest_offloads(bits(&[csum, VIRTIO_NET_F_GUEST_USO4])),
            Offloads::CSUM
        );
        assert_eq!(
            guest_offloads(bits(&[csum, VIRTIO_NET_F_GUEST_ECN])),
            Offloads::CSUM
        );
        let everything = GUEST_OFFLOADS.map(|(bit, _)| bit);
        assert_eq!(guest_offloads(bits(&everything)), Offloads::all());
    }

    #[test]
    fn queues_come_in_pairs() {
        assert_eq!(split(0), (0, 0));
        assert_eq!(split(5), (2, 1));
        assert_eq!(ring_total(4), 8);
    }
}
