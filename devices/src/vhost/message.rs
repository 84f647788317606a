//! Encoding of the messages of a vhost file (`struct vhost_msg_v2`,
//! `include/uapi/linux/vhost_types.h`).

use iommu::{Access, Iova, IovaRange, Perm};
use zerocopy::{FromBytes, FromZeros as _, IntoBytes};

use super::shadow::Entry;

/// Bytes of a message, in either direction and of either version.
pub const SIZE: usize = 72;

const VERSION_1: u32 = 1;
const VERSION_2: u32 = 2;
const MISS: u8 = 1;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;
const READ: u8 = 1;
const WRITE: u8 = 2;

/// `struct vhost_msg_v2`; version 1 has the same offsets.
#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct RawMessage {
    version: u32,
    asid: u32,
    iova: u64,
    size: u64,
    uaddr: u64,
    perm: u8,
    kind: u8,
    padding: [u8; 38],
}

/// A message to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// `VHOST_IOTLB_UPDATE`: adds a translation.
    Update(Entry),
    /// `VHOST_IOTLB_INVALIDATE`: drops every translation that overlaps the
    /// range. A range of 2^64 bytes takes two messages.
    Invalidate(IovaRange),
}

/// `VHOST_IOTLB_MISS` of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss {
    /// First byte that the kernel could not translate.
    pub iova: Iova,
    /// Direction of the queue's access.
    pub access: Access,
}

/// Error for a message of the kernel that is no miss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the host's vhost sent a message of an unknown kind")]
pub struct UnknownMessage;

impl Message {
    /// Encodes the message in version 2; `None` for a range of 2^64 bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Option<[u8; SIZE]> {
        let (range, hva, perm, kind) = match self {
            Self::Update(entry) => (entry.iova, entry.hva.0, perm_bits(entry.perm), UPDATE),
            Self::Invalidate(range) => (*range, 0, 0, INVALIDATE),
        };
        Some(zerocopy::transmute!(RawMessage {
            version: VERSION_2,
            iova: range.first().0,
            size: range.size()?,
            uaddr: hva,
            perm,
            kind,
            ..RawMessage::new_zeroed()
        }))
    }
}

fn perm_bits(perm: Perm) -> u8 {
    let bit = |access, bit| if perm.allows(access) { bit } else { 0 };
    bit(Access::Read, READ) | bit(Access::Write, WRITE)
}

impl Miss {
    /// Decodes a miss of version 1 or 2.
    ///
    /// # Errors
    /// [`UnknownMessage`] when it is too short or no miss.
    pub fn parse(bytes: &[u8]) -> Result<Self, UnknownMessage> {
        let raw = RawMessage::read_from_bytes(bytes).map_err(|_| UnknownMessage)?;
        let access = match raw.perm {
            READ => Access::Read,
            // The kernel requests one of the two. A request for both needs
            // write permission, and an answer has the full permission of the
            // mapping.
            WRITE | 3 => Access::Write,
            _ => return Err(UnknownMessage),
        };
        if !matches!(raw.version, VERSION_1 | VERSION_2) || raw.kind != MISS {
            return Err(UnknownMessage);
        }
        Ok(Self {
            iova: Iova(raw.iova),
            access,
        })
    }
}

/// Decodes the bytes of [`Message::to_bytes`].
#[cfg(any(test, feature = "testing"))]
pub fn parse_message(bytes: &[u8; SIZE]) -> Option<Message> {
    use iommu::Hva;
    let raw: RawMessage = zerocopy::transmute!(*bytes);
    let range = IovaRange::from_len(Iova(raw.iova), raw.size).ok()?;
    let perms = [Perm::empty(), Perm::READ, Perm::WRITE, Perm::READ_WRITE];
    match raw.kind {
        UPDATE => Some(Message::Update(Entry {
            iova: range,
            hva: Hva(raw.uaddr),
            perm: *perms.get(usize::from(raw.perm))?,
        })),
        INVALIDATE => Some(Message::Invalidate(range)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use iommu::Hva;
    use proptest::prelude::*;

    use std::mem::offset_of;

    use super::*;

    const IOVA: usize = offset_of!(RawMessage, iova);
    const PERM: usize = offset_of!(RawMessage, perm);
    const KIND: usize = offset_of!(RawMessage, kind);

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
    fn only_misses_of_both_versions_are_decoded() {
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
        fn any_bytes_decode_to_their_fields_or_an_error(
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
