//! The messages that go over a vhost file (`struct vhost_msg_v2`,
//! `include/uapi/linux/vhost_types.h`), as bytes.

use iommu::{Access, Iova, IovaRange, Perm};

use super::shadow::Entry;

/// Bytes of a message, either way and of either version.
pub const SIZE: usize = 72;

const VERSION_1: u32 = 1;
const VERSION_2: u32 = 2;
const MISS: u8 = 1;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;
const READ: u8 = 1;
const WRITE: u8 = 2;

// Where the fields lie: the same in both versions.
const IOVA: usize = 8;
#[cfg(test)]
const BYTES: usize = 16;
#[cfg(test)]
const HVA: usize = 24;
const PERM: usize = 32;
const KIND: usize = 33;

/// What we tell the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Here is a translation.
    Update(Entry),
    /// Drop every translation that overlaps the range. All of the address
    /// space has no length that fits and takes two messages.
    Invalidate(IovaRange),
}

/// What the kernel asks: the first byte that it could not translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss {
    /// The byte.
    pub iova: Iova,
    /// What the queue wants to do there.
    pub access: Access,
}

/// The kernel sent what no version of its interface sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the host's vhost sent a message of an unknown kind")]
pub struct UnknownMessage;

impl Message {
    /// The message of version 2, or `None` for a range of 2^64 bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Option<[u8; SIZE]> {
        let (range, hva, perm, kind) = match self {
            Self::Update(entry) => (entry.iova, entry.hva.0, perm_bits(entry.perm), UPDATE),
            Self::Invalidate(range) => (*range, 0, 0, INVALIDATE),
        };
        let fields = (VERSION_2.to_ne_bytes().into_iter())
            .chain([0; 4])
            .chain(range.first().0.to_ne_bytes())
            .chain(range.size()?.to_ne_bytes())
            .chain(hva.to_ne_bytes())
            .chain([perm, kind]);
        let mut bytes = [0; SIZE];
        for (byte, value) in bytes.iter_mut().zip(fields) {
            *byte = value;
        }
        Some(bytes)
    }
}

fn perm_bits(perm: Perm) -> u8 {
    let bit = |access, bit| if perm.allows(access) { bit } else { 0 };
    bit(Access::Read, READ) | bit(Access::Write, WRITE)
}

impl Miss {
    /// Reads a message of the kernel, of version 1 or 2.
    ///
    /// # Errors
    /// [`UnknownMessage`] when it is short or no miss.
    pub fn parse(bytes: &[u8]) -> Result<Self, UnknownMessage> {
        let version = u32::from_ne_bytes(field(bytes, 0)?);
        let [kind] = field(bytes, KIND)?;
        let [perm] = field(bytes, PERM)?;
        let access = match perm {
            READ => Access::Read,
            // The kernel asks for one of the two; who wants both must be able
            // to write, and we never grant less than the mapping has.
            WRITE | 3 => Access::Write,
            _ => return Err(UnknownMessage),
        };
        if !matches!(version, VERSION_1 | VERSION_2) || kind != MISS || bytes.len() != SIZE {
            return Err(UnknownMessage);
        }
        Ok(Self {
            iova: Iova(u64::from_ne_bytes(field(bytes, IOVA)?)),
            access,
        })
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], UnknownMessage> {
    let rest = bytes.get(at..).ok_or(UnknownMessage)?;
    rest.first_chunk().copied().ok_or(UnknownMessage)
}

/// Reads back what [`Message::to_bytes`] wrote: the kernel's end, for tests.
#[cfg(test)]
pub fn parse_message(bytes: &[u8; SIZE]) -> Option<Message> {
    use iommu::Hva;
    let word = |at| field(bytes, at).map(u64::from_ne_bytes).ok();
    let range = IovaRange::from_len(Iova(word(IOVA)?), word(BYTES)?).ok()?;
    let perms = [Perm::NONE, Perm::READ, Perm::WRITE, Perm::READ_WRITE];
    match bytes[KIND] {
        UPDATE => Some(Message::Update(Entry {
            iova: range,
            hva: Hva(word(HVA)?),
            perm: *perms.get(usize::from(bytes[PERM]))?,
        })),
        INVALIDATE => Some(Message::Invalidate(range)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use iommu::Hva;
    use proptest::prelude::*;

    use super::*;

    fn miss_bytes(version: u32, iova: u64, perm: u8, kind: u8) -> [u8; SIZE] {
        let mut bytes = [0xee; SIZE];
        bytes[..4].copy_from_slice(&version.to_ne_bytes());
        bytes[IOVA..IOVA + 8].copy_from_slice(&iova.to_ne_bytes());
        bytes[PERM] = perm;
        bytes[KIND] = kind;
        bytes
    }

    #[test]
    fn update_has_the_kernel_s_layout() {
        let entry = Entry {
            iova: IovaRange::from_len(Iova(0x1122_3344_5566_7000), 0x3000).unwrap(),
            hva: Hva(0x7fff_1234_5000),
            perm: Perm::READ,
        };
        let bytes = Message::Update(entry).to_bytes().unwrap();
        assert_eq!(bytes[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[8..16], 0x1122_3344_5566_7000_u64.to_ne_bytes());
        assert_eq!(bytes[16..24], 0x3000_u64.to_ne_bytes());
        assert_eq!(bytes[24..32], 0x7fff_1234_5000_u64.to_ne_bytes());
        assert_eq!(bytes[32..34], [1, 2]);
        assert_eq!(bytes[34..], [0; SIZE - 34]);
    }

    #[test]
    fn invalidation_of_everything_does_not_fit_one_message() {
        assert_eq!(Message::Invalidate(IovaRange::ALL).to_bytes(), None);
        let upper = IovaRange::new(Iova(1 << 63), Iova(u64::MAX)).unwrap();
        let bytes = Message::Invalidate(upper).to_bytes().unwrap();
        assert_eq!(bytes[16..24], (1_u64 << 63).to_ne_bytes());
    }

    #[test]
    fn misses_of_both_versions_are_understood_and_nothing_else() {
        for version in [1, 2] {
            let miss = Miss::parse(&miss_bytes(version, 0x5008, WRITE, MISS)).unwrap();
            assert_eq!((miss.iova, miss.access), (Iova(0x5008), Access::Write));
        }
        assert!(Miss::parse(&miss_bytes(3, 0, READ, MISS)).is_err());
        assert!(Miss::parse(&miss_bytes(2, 0, READ, UPDATE)).is_err());
        assert!(Miss::parse(&miss_bytes(2, 0, 0, MISS)).is_err());
        assert!(Miss::parse(&miss_bytes(2, 0, READ, MISS)[..40]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_parse_to_what_they_say_or_not_at_all(
            bytes in prop::collection::vec(any::<u8>(), 0..2 * SIZE),
        ) {
            if let Ok(miss) = Miss::parse(&bytes) {
                prop_assert_eq!(bytes.len(), SIZE);
                prop_assert_eq!(bytes[KIND], MISS);
                prop_assert_eq!(&miss.iova.0.to_ne_bytes()[..], &bytes[IOVA..IOVA + 8]);
            }
        }
    }
}
