//! Ethernet frames that send a request to the peer and recognise its answer.
//!
//! An ARP request is enough: a host with the address answers it, to the sender's address. A
//! different sender in each request identifies its answer.

use std::net::Ipv4Addr;

/// Length in bytes of `struct virtio_net_hdr` at the start of each frame with VERSION_1 (virtio 1.2
/// §5.1.6).
pub const VIRTIO_NET_HEADER: usize = 12;

const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
/// Ethernet and IPv4 addresses of 6 and 4 bytes.
const ARP_ADDRESSES: [u8; 6] = [0, 1, 8, 0, 6, 4];
const REQUEST: [u8; 2] = [0, 1];
const REPLY: [u8; 2] = [0, 2];
/// Lower bound on an Ethernet frame in bytes, without its checksum.
const MIN_FRAME: usize = 60;

/// An ARP request of `sender` for `peer`, after a virtio header.
pub fn arp_request(mac: [u8; 6], sender: Ipv4Addr, peer: Ipv4Addr) -> Vec<u8> {
    let mut frame = vec![0; VIRTIO_NET_HEADER];
    for part in [
        &BROADCAST[..],
        &mac,
        &ETHERTYPE_ARP,
        &ARP_ADDRESSES,
        &REQUEST,
        &mac,
        &sender.octets(),
        &[0; 6],
        &peer.octets(),
    ] {
        frame.extend_from_slice(part);
    }
    frame.resize(VIRTIO_NET_HEADER + MIN_FRAME, 0);
    frame
}

/// Returns the address that sent the request, if `frame`, with its virtio header, is `peer`'s
/// answer.
pub fn arp_reply(frame: &[u8], peer: Ipv4Addr) -> Option<Ipv4Addr> {
    let frame = frame.get(VIRTIO_NET_HEADER..)?;
    let (ethertype, arp) = (frame.get(12..14)?, frame.get(14..42)?);
    let is_answer = ethertype == ETHERTYPE_ARP
        && arp[..6] == ARP_ADDRESSES
        && arp[6..8] == REPLY
        && arp[14..18] == peer.octets();
    let asker: [u8; 4] = arp[24..28].try_into().ok()?;
    is_answer.then(|| asker.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Ipv4Addr = Ipv4Addr::new(10, 0, 3, 2);
    const PEER: Ipv4Addr = Ipv4Addr::new(10, 0, 3, 1);
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    /// A kernel's answer to `request`.
    fn answer(request: &[u8]) -> Vec<u8> {
        let mut reply = request.to_vec();
        let arp = &mut reply[VIRTIO_NET_HEADER + 14..];
        arp[6..8].copy_from_slice(&REPLY);
        arp[8..14].copy_from_slice(&[6; 6]);
        arp[14..18].copy_from_slice(&PEER.octets());
        arp[18..24].copy_from_slice(&MAC);
        arp[24..28].copy_from_slice(&OWN.octets());
        reply
    }

    #[test]
    fn a_request_has_the_form_of_rfc_826() {
        let frame = arp_request(MAC, OWN, PEER);
        assert_eq!(frame.len(), 72);
        assert_eq!(frame[..12], [0; 12]);
        assert_eq!(
            frame[12..24],
            [255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 7]
        );
        assert_eq!(frame[24..34], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(frame[34..44], [2, 0, 0, 0, 0, 7, 10, 0, 3, 2]);
        assert_eq!(frame[50..54], [10, 0, 3, 1]);
    }

    #[test]
    fn only_the_peers_answer_counts() {
        let request = arp_request(MAC, OWN, PEER);
        assert_eq!(arp_reply(&request, PEER), None, "a request is no answer");
        let reply = answer(&request);
        assert_eq!(arp_reply(&reply, PEER), Some(OWN));
        assert_eq!(arp_reply(&reply, OWN), None, "an answer of another address");
        assert_eq!(arp_reply(&reply[..50], PEER), None, "cut short");
    }
}
