//! A naive model of requests (virtio 1.2 §5.13.6) on bytes and lists. It shares
//! no code with the model and imports nothing of it: the fuzz target of the
//! device includes this file too.

use std::collections::BTreeMap;

pub const OK: u8 = 0;
pub const INVAL: u8 = 4;
pub const RANGE: u8 = 5;
pub const NOENT: u8 = 6;

pub const READ: u32 = 1;
pub const WRITE: u32 = 2;
const MMIO: u32 = 4;
const PAGE: u64 = 4096;

/// Feature bits (§5.13.3) that change the permitted requests.
const F_MAP_UNMAP: u64 = 1 << 2;
const F_PROBE: u64 = 1 << 4;
const F_MMIO: u64 = 1 << 5;
const F_BYPASS_CONFIG: u64 = 1 << 6;

const PROBE: u8 = 5;
/// Bytes of the properties and the tail of a PROBE request.
pub const PROBE_REPLY: usize = 516;
const TAIL: usize = 4;

/// A mapping; both ends are inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mapped {
    pub first: u64,
    pub last: u64,
    pub to: u64,
    pub perm: u32,
}

impl Mapped {
    fn overlaps(&self, first: u64, last: u64) -> bool {
        self.first <= last && first <= self.last
    }

    fn lies_in(&self, first: u64, last: u64) -> bool {
        first <= self.first && self.last <= last
    }
}

/// Result of an access of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    Mapping(Mapped),
    Forbidden,
    Unmapped,
    Blocked,
}

#[derive(Clone, Debug)]
pub struct Domain {
    pub bypass: bool,
    pub mapped: Vec<Mapped>,
}

#[derive(Clone, Debug)]
pub struct Naive {
    /// First and last address that may be mapped, inclusive.
    pub input: (u64, u64),
    /// First and last address of the MSI window, inclusive.
    pub msi: (u64, u64),
    /// The last address of RAM, inclusive; RAM begins at 0.
    pub ram: u64,
    /// Negotiated feature bits.
    pub features: u64,
    /// Whether endpoints without a domain are in bypass.
    pub bypass: bool,
    /// Endpoints, each with the domain it is attached to.
    pub endpoints: BTreeMap<u32, Option<u32>>,
    pub domains: BTreeMap<u32, Domain>,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Whether a request of an available type is complete and has zeros in the
/// reserved fields that must be zero.
fn is_well_formed(bytes: &[u8]) -> bool {
    let (size, reserved) = match bytes[0] {
        1 => (20, 16..20),
        2 => (20, 0..0),
        3 => (36, 0..0),
        4 => (28, 24..28),
        _ => (72, 0..0),
    };
    bytes.len() >= size && bytes[reserved].iter().all(|byte| *byte == 0)
}

impl Naive {
    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Number of bytes that the device writes to a device-writable part of
    /// `room` bytes. 0: it returns the request unwritten.
    pub fn written(&self, bytes: &[u8], room: usize) -> usize {
        let available = match bytes.first() {
            Some(1 | 2) => true,
            Some(3 | 4) => self.has(F_MAP_UNMAP),
            Some(&PROBE) => self.has(F_PROBE),
            _ => false,
        };
        match bytes.first() {
            _ if !available || room < TAIL => 0,
            Some(&PROBE) => room.min(PROBE_REPLY),
            _ => TAIL,
        }
    }

    /// The permitted statuses of a request that is not returned unwritten: `OK`
    /// when it breaks no rule, otherwise that of each rule that it breaks.
    pub fn verdict(&self, bytes: &[u8], room: usize) -> Vec<u8> {
        if !is_well_formed(bytes) || (bytes[0] == PROBE && room < PROBE_REPLY) {
            return vec![INVAL];
        }
        let mut broken = match bytes[0] {
            1 => self.attach_breaks(word(bytes, 4), word(bytes, 8), word(bytes, 12)),
            2 => match self.endpoints.get(&word(bytes, 8)) {
                None => vec![NOENT],
                Some(domain) if *domain != Some(word(bytes, 4)) => vec![INVAL],
                Some(_) => vec![],
            },
            3 => self.map_breaks(bytes),
            4 => self.unmap_breaks(word(bytes, 4), long(bytes, 8), long(bytes, 16)),
            _ if self.endpoints.contains_key(&word(bytes, 4)) => vec![],
            _ => vec![NOENT],
        };
        if broken.is_empty() {
            broken.push(OK);
        }
        broken
    }

    fn attach_breaks(&self, id: u32, endpoint: u32, flags: u32) -> Vec<u8> {
        let mut broken = Vec::new();
        if flags > u32::from(self.has(F_BYPASS_CONFIG)) {
            broken.push(INVAL);
        }
        if !self.endpoints.contains_key(&endpoint) {
            broken.push(NOENT);
        }
        let other = |domain: &Domain| domain.bypass != (flags & 1 == 1);
        if self.domains.get(&id).is_some_and(other) {
            broken.push(INVAL);
        }
        broken
    }

    fn map_breaks(&self, bytes: &[u8]) -> Vec<u8> {
        let (first, last) = (long(bytes, 8), long(bytes, 16));
        let (to, flags) = (long(bytes, 24), word(bytes, 32));
        let mut broken = self.range_breaks(word(bytes, 4), first, last);
        let whole = first.is_multiple_of(PAGE) && last % PAGE == PAGE - 1;
        if !whole || first < self.input.0 || last > self.input.1 {
            broken.push(RANGE);
        }
        let known = READ | WRITE | if self.has(F_MMIO) { MMIO } else { 0 };
        if flags & !known != 0 || (first <= self.msi.1 && self.msi.0 <= last) {
            broken.push(INVAL);
        }
        let beyond = to.checked_add(last.wrapping_sub(first)).is_none();
        if !to.is_multiple_of(PAGE) || (first <= last && beyond) {
            broken.push(RANGE);
        }
        let taken = |domain: &Domain| domain.mapped.iter().any(|m| m.overlaps(first, last));
        if self.domains.get(&word(bytes, 4)).is_some_and(taken) {
            broken.push(INVAL);
        }
        broken
    }

    fn unmap_breaks(&self, id: u32, first: u64, last: u64) -> Vec<u8> {
        let mut broken = self.range_breaks(id, first, last);
        let split = |m: &Mapped| m.overlaps(first, last) && !m.lies_in(first, last);
        let splits = |domain: &Domain| domain.mapped.iter().any(split);
        if self.domains.get(&id).is_some_and(splits) {
            broken.push(RANGE);
        }
        broken
    }

    fn range_breaks(&self, id: u32, first: u64, last: u64) -> Vec<u8> {
        let mut broken = Vec::new();
        match self.domains.get(&id) {
            None => broken.push(NOENT),
            Some(domain) if domain.bypass => broken.push(INVAL),
            Some(_) => {}
        }
        if last < first {
            broken.push(INVAL);
        }
        broken
    }

    /// Executes a request that had the status `OK`.
    pub fn carry_out(&mut self, bytes: &[u8]) {
        let id = word(bytes, 4);
        match bytes[0] {
            1 => {
                self.endpoints.insert(word(bytes, 8), Some(id));
                self.domains.entry(id).or_insert(Domain {
                    bypass: word(bytes, 12) == 1,
                    mapped: Vec::new(),
                });
            }
            2 => {
                self.endpoints.insert(word(bytes, 8), None);
            }
            3 => self.domains.get_mut(&id).unwrap().mapped.push(Mapped {
                first: long(bytes, 8),
                last: long(bytes, 16),
                to: long(bytes, 24),
                perm: word(bytes, 32) & (READ | WRITE),
            }),
            4 => {
                let (first, last) = (long(bytes, 8), long(bytes, 16));
                let mapped = &mut self.domains.get_mut(&id).unwrap().mapped;
                mapped.retain(|mapping| !mapping.lies_in(first, last));
            }
            _ => {}
        }
        let used: Vec<_> = self.endpoints.values().flatten().collect();
        self.domains.retain(|id, _| used.contains(&id));
    }

    /// Changes `bypass` of the configuration for the driver.
    pub fn set_bypass(&mut self, value: u8) {
        if self.has(F_BYPASS_CONFIG) && value < 2 {
            self.bypass = value == 1;
        }
    }

    /// Resets the device and negotiates these features.
    pub fn reset(&mut self, features: u64) {
        self.domains.clear();
        self.endpoints
            .values_mut()
            .for_each(|domain| *domain = None);
        self.features = features;
    }

    /// The domain of an endpoint, if it is attached.
    pub fn domain(&self, endpoint: u32) -> Option<&Domain> {
        self.domains.get(&self.endpoints[&endpoint]?)
    }

    pub fn in_bypass(&self, endpoint: u32) -> bool {
        self.domain(endpoint)
            .map_or(self.bypass, |domain| domain.bypass)
    }

    /// The mappings of an exact shadow of the endpoint, in ascending order.
    pub fn shadow(&self, endpoint: u32) -> Vec<Mapped> {
        if self.in_bypass(endpoint) {
            return vec![self.around(0)];
        }
        let mut all = self
            .domain(endpoint)
            .map_or(Vec::new(), |domain| domain.mapped.clone());
        all.sort_unstable();
        all
    }

    /// Result of an access of an endpoint.
    pub fn access(&self, endpoint: u32, iova: u64, perm: u32) -> Seen {
        if self.in_bypass(endpoint) {
            return Seen::Mapping(self.around(iova));
        }
        let Some(domain) = self.domain(endpoint) else {
            return Seen::Blocked;
        };
        let msi = Mapped {
            first: self.msi.0,
            last: self.msi.1,
            to: self.msi.0,
            perm: WRITE,
        };
        let mut all = domain.mapped.iter().chain([&msi]);
        match all.find(|mapping| mapping.overlaps(iova, iova)) {
            Some(mapping) if mapping.perm & perm == perm => Seen::Mapping(*mapping),
            Some(_) => Seen::Forbidden,
            None => Seen::Unmapped,
        }
    }

    /// The mapping of bypass around `iova`: all of RAM, or a page outside of
    /// it.
    fn around(&self, iova: u64) -> Mapped {
        let page = iova - iova % PAGE;
        let (first, last) = if iova <= self.ram {
            (0, self.ram)
        } else {
            (page, page + (PAGE - 1))
        };
        Mapped {
            first,
            last,
            to: first,
            perm: READ | WRITE,
        }
    }

    /// Addresses to check: both sides of every edge of a mapping.
    pub fn edges(&self) -> Vec<u64> {
        let domains = self.domains.values();
        let mapped = domains.flat_map(|domain| domain.mapped.iter().map(|m| (m.first, m.last)));
        let ends = mapped.chain([self.msi, self.input, (0, self.ram)]);
        ends.flat_map(|(first, last)| [first.wrapping_sub(1), first, last, last.wrapping_add(1)])
            .collect()
    }
}

/// Mappings of a notifier's shadow.
#[derive(Clone, Debug, Default)]
pub struct ShadowMappings(Vec<Mapped>);

impl ShadowMappings {
    pub fn map(&mut self, new: Mapped) {
        let taken = self
            .0
            .iter()
            .find(|held| held.overlaps(new.first, new.last));
        assert_eq!(taken, None, "told of {new:x?}, too");
        self.0.push(new);
    }

    pub fn unmap(&mut self, first: u64, last: u64) {
        self.0.retain(|held| {
            let inside = held.lies_in(first, last);
            assert!(inside || !held.overlaps(first, last), "{held:x?} is split");
            !inside
        });
    }

    pub fn in_order(&self) -> Vec<Mapped> {
        let mut all = self.0.clone();
        all.sort_unstable();
        all
    }
}
